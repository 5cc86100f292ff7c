"""One resident backbone, many adapters, over HTTP: ``adaptkit serve --backbone B seg=FILE depth=you/depth``.

    limits.py    how much a request may ask for, and what is an image
    allow.py     from where files may be mounted on request
    mounts.py    adapters by name on one backbone, and networks around copies that share its weights
    passes.py    runs of the backbone, each made once for all who read it; when images may share one
    worker.py    the one thread that owns the model: a queue, a window, batches
    reply.py     an answer as JSON or PNG
    metrics.py   what happened, in numbers
    service.py   from the bytes of images to answers: what the routes and the page both call
    body.py      what comes in: a bounded body, the images in it
    app.py       the routes                            (FastAPI)
    docs.py      what they are, on a page of our own
    streams.py   connections that a page holds open, let go at the end
    ui.py        a page to try it on                   (Gradio)
    legend.py    the words beside a drawn answer
    start.py     from the words of the command line to a service
    run.py       a socket, signals, a graceful end     (uvicorn)

What is served is what ``adaptkit.from_pretrained(file, backbone=B).predict(image)`` says, bit for bit.
"""

from adaptkit.serve.limits import Limits, Refused
from adaptkit.serve.mounts import Mounts
from adaptkit.serve.passes import BATCHING
from adaptkit.serve.worker import Worker

__all__ = ["BATCHING", "Limits", "Mounts", "Refused", "Worker"]
