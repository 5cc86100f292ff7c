"""A page that is looked at does not hold up the end of the server."""

import asyncio

import pytest

from adaptkit.serve.streams import Endless, Streams

HEARTBEAT = {"type": "http", "path": "/ui/gradio_api/heartbeat/abc"}


def asked(app, scope=HEARTBEAT, ends=True):
    """What an application sends until its streams are ended, or until the server itself cancels it."""
    sent, streams = [], Streams()

    async def send(message):
        sent.append(message)

    async def run():
        task = asyncio.ensure_future(Endless(app, streams)(scope, None, send))
        await asyncio.sleep(0.01)
        if ends:
            streams.end()
        else:
            task.cancel()
        await asyncio.wait_for(task, 60)

    asyncio.run(run())
    assert not streams.sent
    return sent


async def endless(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"alive", "more_body": True})
    await asyncio.Event().wait()


async def silent(scope, receive, send):
    await asyncio.Event().wait()


async def polite(scope, receive, send):
    try:
        await endless(scope, receive, send)
    finally:
        await send({"type": "http.response.body", "body": b"bye", "more_body": False})


def test_a_heartbeat_ends_in_order():
    *_, alive, last = asked(endless)
    assert alive["body"] == b"alive"
    assert last == {"type": "http.response.body", "body": b""}


def test_one_that_ends_by_itself_is_not_ended_twice():
    assert [m.get("body") for m in asked(polite)] == [None, b"alive", b"bye"]


def test_one_that_said_nothing_yet_is_refused():
    assert [m.get("status") for m in asked(silent)] == [503, None]


def test_what_the_server_cancels_is_cancelled():
    with pytest.raises(asyncio.CancelledError):
        asked(endless, ends=False)


def test_answers_are_waited_for():
    finished = []

    async def answer(scope, receive, send):
        await asyncio.sleep(0.05)  # the streams end meanwhile
        finished.append(True)

    asked(answer, {"type": "http", "path": "/ui/gradio_api/queue/data"})
    assert finished
