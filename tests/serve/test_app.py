"""The routes: answers by Accept, and every error with its status and its reason."""

import base64
import io
import re
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from conftest import backbone

pytest.importorskip("prometheus_client")
pytest.importorskip("multipart")
TestClient = pytest.importorskip("fastapi.testclient").TestClient
pytestmark = pytest.mark.filterwarnings("ignore:task .* has a pass of its own")

from adaptkit.predict.draw import overlay  # noqa: E402
from adaptkit.serve import Limits, Mounts, Worker  # noqa: E402
from adaptkit.serve.allow import Allowed  # noqa: E402
from adaptkit.serve.app import create_app  # noqa: E402
from adaptkit.serve.docs import EXAMPLES, docs_page  # noqa: E402
from adaptkit.serve.limits import Refused  # noqa: E402
from adaptkit.serve.reply import chosen, picture  # noqa: E402
from adaptkit.serve.service import Service  # noqa: E402

SMALL = Limits(body=60_000, pixels=10_000, images=3, requests=2, held_pixels=20_000)
AS_PNG = {"Accept": "image/png"}


def photo(size=(48, 64), seed=0, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.fixture(scope="module")
def service(files):
    mounts = Mounts(backbone())
    for name in ("seg", "depth", "class", "detector"):
        mounts.mount(name, str(files[name]))
    return Service(mounts, Worker(mounts), SMALL, Allowed([str(files["seg"].parent)]))


@pytest.fixture(scope="module")
def client(service):
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_mask_is_what_predict_says_bit_for_bit(client, alone, kind, tmp_path):
    data = photo(kind=kind)
    (tmp_path / "photo").write_bytes(data)
    expected = alone["seg"].predict(tmp_path / "photo")
    mask = opened(client.post("/predict/seg", content=data, headers=AS_PNG).content)
    assert mask.mode == "L"
    assert np.array_equal(np.asarray(mask), expected.mask)
    said = client.post("/predict/seg", content=data).json()
    assert said == {"task": "seg", "answers": "segmentation", **expected.json()}


def test_clients_at_once_are_answered_as_alone(service, alone, tmp_path):
    files = [photo(size, seed) for seed, size in enumerate([(48, 64), (64, 48), (48, 64), (48, 64)])]
    wide = Service(service.mounts, service.worker)
    with_limits = TestClient(create_app(wide))  # not entered: the worker goes on
    found = {}

    def ask(i):
        found[i] = with_limits.post("/predict/seg", content=files[i % 4], headers=AS_PNG).content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, data in found.items():
        (tmp_path / "photo.png").write_bytes(files[i % 4])
        assert np.array_equal(np.asarray(opened(data)), alone["seg"].predict(tmp_path / "photo.png").mask)
    assert len(found) == 12


def test_depth_is_millimetres_in_sixteen_bits(client, alone, tmp_path):
    (tmp_path / "photo.png").write_bytes(photo())
    metres = alone["depth"].predict(tmp_path / "photo.png").depth
    found = np.asarray(opened(client.post("/predict/depth", content=photo(), headers=AS_PNG).content))
    assert found.dtype == np.uint16
    assert np.array_equal(found, (metres * 1000).round().astype(np.uint16))
    far = picture(type(alone["depth"].predict(tmp_path / "photo.png"))((1, 2), depth=np.float32([[70, np.nan]])), None)
    assert np.asarray(far).tolist() == [[65535, 0]]


def test_several_tasks_and_several_images_in_one_request(client):
    both = client.post("/predict?tasks=seg,class", content=photo()).json()
    assert list(both) == ["seg", "class"]
    one = client.post("/predict/class", content=photo()).json()
    assert one == {"task": "class", **both["class"]}
    form = [("image", ("a.png", photo(seed=0))), ("image", ("b.png", photo(seed=1)))]
    two = client.post("/predict/class", files=form).json()
    assert two[0] == one
    assert two[1] != one
    assert set(client.post("/predict", content=photo()).json()) == {"seg", "depth", "class", "detector"}


def test_the_png_can_be_in_the_json_and_the_answer_over_the_picture(client, alone, tmp_path):
    said = client.post("/predict/seg?png=true", content=photo()).json()
    assert base64.b64decode(said["png"]) == client.post("/predict/seg", content=photo(), headers=AS_PNG).content
    (tmp_path / "photo.png").write_bytes(photo())
    seen = np.asarray(opened(photo()))
    for name in ("seg", "depth", "class", "detector"):  # what `adaptkit predict` writes, pixel by pixel
        drawn = opened(client.post(f"/predict/{name}?draw=true", content=photo(), headers=AS_PNG).content)
        assert drawn.mode == "RGB"
        assert np.array_equal(np.asarray(drawn), np.asarray(overlay(seen, alone[name].predict(tmp_path / "photo.png"))))
    boxes = opened(client.post("/predict/detector?threshold=0", content=photo(), headers=AS_PNG).content)
    assert (boxes.mode, boxes.size) == ("RGB", (64, 48))
    objects = client.post("/predict/detector?threshold=0", content=photo()).json()["objects"]
    assert {"name", "score", "box"} == set(objects[0])


@pytest.mark.parametrize(
    ("path", "options", "status", "why"),
    [
        ("/predict/nope", {"content": photo()}, 404, "no task is named 'nope'; the tasks are: seg, depth"),
        ("/predict?tasks=seg,nope", {"content": photo()}, 404, "no task is named 'nope'"),
        ("/predict/seg", {"content": b"hello"}, 400, "is not an image that can be read"),
        ("/predict/seg", {"content": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 400, "is not an image"),
        ("/predict/seg", {"content": photo()[:2000]}, 400, "is not an image that can be read whole"),
        ("/predict/seg", {"content": b""}, 400, "the body is empty"),
        ("/predict/seg", {"data": {"a": "b"}, "files": {"x": ("", b"")}}, 400, "the form has no file"),
        ("/predict/seg", {"content": photo((101, 100), kind="JPEG")}, 413, "10,100; the limit is 10,000"),
        ("/predict/seg", {"content": photo((400, 1))}, 413, "task 'seg' makes it 40 x 16000; the limit is 10,000"),
        ("/predict/seg", {"content": b"x" * 60_001}, 413, "larger than 60,000 bytes"),
        ("/predict/seg", {"files": [("i", ("a", photo((8, 8))))] * 4}, 413, "more than 3 images"),
        ("/predict/seg", {"files": [("i", ("a", photo((99, 99), kind="JPEG")))] * 3}, 413, "29,403 pixels together"),
        ("/predict/seg", {"json": {}}, 415, "Content-Type: application/json: send an image"),
        ("/predict/seg", {"content": photo(), "headers": {"Accept": "text/html"}}, 406, "answers are application/json"),
        ("/predict/class", {"content": photo(), "headers": AS_PNG}, 406, "a classification is no picture"),
        ("/predict?tasks=seg", {"content": photo(), "headers": AS_PNG}, 406, "several tasks are no picture"),
    ],
)
def test_what_is_refused_says_why(client, path, options, status, why):
    found = client.post(path, **options)
    assert (found.status_code, why in found.json()["detail"]) == (status, True), found.text


def test_a_body_without_a_length_is_counted_as_it_comes(client):
    chunks = (b"x" * 1000 for _ in range(100))
    assert client.post("/predict/seg", content=chunks).status_code == 413


def test_a_crowd_is_told_to_come_again(client, service):
    with service.gate.request(), service.gate.request():
        found = client.post("/predict/seg", content=photo())
    assert (found.status_code, found.headers["retry-after"]) == (503, "1")
    with service.gate.pixels(19_000):
        assert client.post("/predict/seg", content=photo()).status_code == 503
    assert client.post("/predict/seg", content=photo()).status_code == 200
    assert (service.gate.requests, service.gate.held) == (0, 0)


def test_adapters_are_mounted_and_unmounted(client, files):
    found = client.post("/adapters/lora", json={"file": str(files["lora"])})
    assert (found.status_code, found.json()["pass"]) == (201, "alone")
    assert client.post("/predict/lora", content=photo()).status_code == 200
    assert client.post("/adapters/lora", json={"file": str(files["lora"])}).status_code == 409
    assert [a["name"] for a in client.get("/adapters").json()["adapters"]][-1] == "lora"
    assert client.delete("/adapters/lora").status_code == 204
    assert client.delete("/adapters/lora").status_code == 404
    assert client.post("/predict/lora", content=photo()).status_code == 404
    assert client.post("/adapters/a.b", json={"file": str(files["lora"])}).status_code == 422
    assert client.post("/adapters/x", json={"file": str(files["lora"].parent / "none")}).status_code == 422


def test_files_come_from_where_they_may(files, tmp_path, monkeypatch):
    folder = files["seg"].parent
    for places, file, may in [
        ([], str(files["seg"]), False), ([str(folder)], str(files["seg"]), True), ([str(folder)], "/etc", False),
        ([str(folder)], f"{folder}/../..", False), ([str(folder)], "you/depth", False), (["hub"], "you/depth", True),
        (["hub:you"], "you/depth", True), (["hub:me"], "you/depth", False), (["hub"], str(files["seg"]), False),
        (["anywhere"], "/etc", True),
    ]:  # fmt: skip
        with nullcontext() if may else pytest.raises(Refused) as refused:
            Allowed(places).check(file)
        assert may or refused.value.status == 403, (places, file)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    for place in (".", str(folder)):
        with pytest.raises(Refused):
            Allowed([place]).check("~/secret")
    (tmp_path / "home").mkdir()
    Allowed(["~/"]).check(str(tmp_path / "home" / "file"))
    link = tmp_path / "link"
    link.symlink_to("/etc")
    with pytest.raises(Refused):
        Allowed([str(tmp_path)]).check(str(link))
    with pytest.raises(ValueError, match="that is a task; put it first"):
        Allowed(["seg=runs/seg"])


def test_health_metrics_and_the_description(client):
    assert client.get("/healthz").json()["adapters"] == ["seg", "depth", "class", "detector"]
    client.post("/predict/seg", content=photo())
    client.post("/predict/anything-at-all", content=photo())
    text = client.get("/metrics").text
    for line in ('adaptkit_requests_total{status="200",task="seg"}', 'adaptkit_errors_total{status="404"}',
                 'adaptkit_request_seconds_bucket{le="1.0",task="seg"}', "adaptkit_batch_images_count",
                 'adaptkit_passes_total{kind="shared"}', 'task="unknown"'):  # fmt: skip
        assert line in text
    assert "anything-at-all" not in text
    paths = client.get("/openapi.json").json()["paths"]
    assert "image/*" in paths["/predict/{task}"]["post"]["requestBody"]["content"]


def test_the_page_of_the_routes_is_whole_and_needs_no_other_host(client, service):
    page = client.get("/docs").text
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, said in methods.items():
            assert EXAMPLES[method, path]
            assert f"<b>{method.upper()}</b><code>{path}</code><span>{said['summary']}</span>" in page
            assert all(f"<code>{one['name']}</code>" in page for one in said.get("parameters", []))
    assert "curl --data-binary @photo.jpg http://testserver/predict/seg<" in page
    assert "class 0, class 1" in page
    hosts = set(re.findall(r"[a-z]+://[^/\s\"'<]+", page))
    assert hosts == {"http://testserver", "http://www.w3.org"}  # the second names SVG, and is not asked
    assert not re.findall(r"(?:src|href)=\"(?!data:|openapi.json)", page)
    assert client.get("/favicon.ico").headers["content-type"].startswith("image/svg+xml")
    assert client.get("/", follow_redirects=False).headers["location"] == "/docs"


def test_the_page_of_the_routes_escapes_what_files_and_clients_say(client):
    description = client.get("/openapi.json").json()
    one = {"name": "seg", "answers": "segmentation", "classes": ["<script>", *"abcdefghijklm"], "pass": "shared"}
    page = docs_page(description, 'http://"><script>', [one], has_page=True)
    assert "<script" not in page
    assert "and 2 more" in page
    assert 'href="ui/"' in page
    assert "Nothing is mounted yet" in docs_page(description, "http://x", [])


@pytest.mark.parametrize(
    ("accept", "kind"),
    [(None, "json"), ("*/*", "json"), ("image/png", "png"), ("image/*,*/*;q=0.8", "png"), ("text/html, */*;q=0.1", "json"),
     ("image/png;q=0.5, application/json", "json"), ("application/json;q=0, */*", "png")],
)  # fmt: skip
def test_the_kind_of_answer_is_what_is_wanted_most(accept, kind):
    assert chosen(accept).endswith(kind)
