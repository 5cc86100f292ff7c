"""One file adds an adapter, a head or a family from outside the package."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ADAPTER = '''
from dataclasses import dataclass

import torch
from adaptkit import register_adapter, register_head
from adaptkit.adapters.base import BlockAdapter

@dataclass(frozen=True)
class BottleneckConfig:
    width: int = 8

@register_adapter("bottleneck", BottleneckConfig)
class Bottleneck(BlockAdapter):
    """A bottleneck after each block (Houlsby et al., ICML 2019), zero at the start."""

    def __init__(self, spec, config):
        super().__init__(spec, config)
        self.down = torch.nn.ModuleList(torch.nn.Linear(spec.embed_dim, config.width) for _ in range(spec.depth))
        self.up = torch.nn.ModuleList(torch.nn.Linear(config.width, spec.embed_dim) for _ in range(spec.depth))
        for up in self.up:
            torch.nn.init.zeros_(up.weight)
            torch.nn.init.zeros_(up.bias)

    def wrap(self, block, index, trace):
        def run(x):
            x = block(x)
            return x + self.up[index](torch.relu(self.down[index](x)))
        return run
'''

FAMILY = '''
import torch
from adaptkit import Spec, register_family
from adaptkit.core.view import Block, Source, ViT

@register_family("timm.models.vision_transformer_relpos.VisionTransformerRelPos")
class RelPosViT(ViT):
    """timm's ViT with relative positions, at its own size."""

    def __init__(self, host):
        blocks, patch = host.blocks, host.patch_embed.patch_size[0]
        sizes = (host.embed_dim, len(blocks), blocks[0].attn.num_heads, patch, host.num_prefix_tokens)
        super().__init__(host, Spec("relpos-vit", *sizes))

    def embed(self, image, grid):
        return self.backbone.patch_embed(image)

    def blocks(self, image, grid):
        return [Block(run=b, norm1=b.norm1, attn=b.attn, scale1=b.ls1, norm2=b.norm2, mlp=b.mlp, scale2=b.ls2,
                      qkv=None, out=None) for b in self.backbone.blocks]

    def norm(self, x):
        return self.backbone.norm(x)

    def classify(self, x):
        return self.backbone.forward_head(x)

    def fingerprint_tensors(self):
        return {"patch": self.backbone.patch_embed.proj.weight}

    def source(self):
        return Source("relpos-vit")

    def accept(self, grid):
        for b in self.backbone.blocks:  # of a copy: its tables are of the backbone's own grid
            b.attn.rel_pos = None
'''

USE = """
import warnings
import torch
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import adaptkit
    assert "bottleneck" in adaptkit.list_adapters()
said = [str(w.message) for w in caught if "plug-in" in str(w.message)]
assert len(said) == 1 and "'broken' of package others (not_there)" in said[0], said

torch.manual_seed(0)
torch.set_grad_enabled(False)
sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
host = VisionTransformerRelPos(**sizes).eval()
x = torch.randn(2, 3, 32, 32)
expected = host(x)
model = adaptkit.attach(host, ("bottleneck", {"width": 4}), "sfp")
features = model(x)
assert torch.equal(features.logits, expected)
assert [m.shape[-1] for m in features.maps] == [8, 4, 2, 1]
with torch.no_grad():
    for p in model.adapters.parameters():
        p.add_(0.1)
model.save("saved")
torch.manual_seed(0)
again = adaptkit.attach(VisionTransformerRelPos(**sizes), "saved")
assert torch.equal(again(x).tokens, model(x).tokens)
assert not torch.equal(again(x).tokens, features.tokens)
print("works")
"""

#: in an environment without the plug-in: what is run -> the last line of its error
MISSING = {
    """
    import os, shutil
    shutil.move("bottleneck.py", "elsewhere.py"); shutil.rmtree("others-1.0.dist-info")
    import adaptkit, timm
    sys.path.remove("") if "" in sys.path else None
    file = adaptkit.load("saved")
    print(file)
    adaptkit.model.saved.configured_by(file, file.header["adapters"][0], adaptkit.core.registry.adapters(), "adapter")
    """: r"ValueError: .*no adapter is named 'bottleneck'.*the package others: if you trust it, pip install others$",
    """
    import adaptkit
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos
    adaptkit.attach(VisionTransformerRelPos(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=5), "saved")
    """: r"TypeError: no family sees timm.*the package others: if you trust it, pip install others$",
}


def test_an_installed_package_adds_an_adapter_and_a_family_in_one_file_each(tmp_path):
    (tmp_path / "bottleneck.py").write_text(ADAPTER)
    (tmp_path / "relpos_vit.py").write_text(FAMILY)
    assert all(len(text.strip().splitlines()) <= 42 for text in (ADAPTER, FAMILY))
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = "[adaptkit.plugins]\nbottleneck = bottleneck\nrelpos = relpos_vit\nbroken = not_there\n"
    (info / "entry_points.txt").write_text(points)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\n" + textwrap.dedent(USE)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "works"
    header = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert header["adapters"][0]["package"] == header["backbone"]["package"] == "others"
    assert "package" not in header["adapters"][1]  # sfp is our own
    for code, said in MISSING.items():
        there = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"import sys; sys.path[:0] = [{str(root)!r}]\n" + textwrap.dedent(code),
        ]
        done = subprocess.run(there, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        assert re.search(said, done.stderr.splitlines()[-1]), done.stderr
