"""What `benchmarks.serving` measures, each in a process of its own: `python -m benchmarks.one_request TASK JSON`.

Nothing of SSCloud is imported before a task begins: the packaged function brings a copy of its own.

A task loads what it needs, does its work once on something small, and then measures once. The last line it prints is a
JSON object. Times are seconds of the processor (of all threads) and of the clock; memory is in bytes.
"""

import base64
import contextlib
import gc
import importlib
import json
import logging
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nuclio_sdk
import nuclio_sdk.event
import nuclio_sdk.json_encoder
import nuclio_sdk.logger

if TYPE_CHECKING:
    from sscloud.stages import Stages

SMALL = 1024
"""Width of the picture that a process answers first, so that lazy initialisation is not measured."""


def clock_of(device: str) -> Callable[[], float]:
    """Processor time, which other programs disturb least; where a GPU computes, the wall's."""
    return time.process_time if device == "cpu" else time.perf_counter


def peak_bytes() -> int:
    """Largest resident memory of this process so far.

    The kernel's ru_maxrss begins with that of the process which started this one, so it is the second choice.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def extra_peak(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` gives back, and by how much memory grew at most while it ran (from the peak so far where the kernel
    cannot forget that one)."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    return work(), peak_bytes() - before


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> tuple[Any, dict[str, float]]:
    """What `work` gives back, its `seconds` by a clock and by the `wall` clock."""
    wall, started = time.perf_counter(), clock()
    result = work()
    return result, {"seconds": clock() - started, "wall": time.perf_counter() - wall}


class Function:
    """A handler inside what Nuclio's Python wrapper puts around it: bytes in, bytes out.

    Args:
        handler: `handler(context, event)`.
        context: given to it.
        stages: takes the times of `event` and `encode`, what the wrapper does before and after the handler.
    """

    def __init__(self, handler: Callable[[Any, Any], Any], context: nuclio_sdk.Context, stages: "Stages") -> None:
        self._handler = handler
        self._context = context
        self._stages = stages
        self._encode = nuclio_sdk.json_encoder.Encoder().encode

    def __call__(self, body: bytes) -> bytes:
        """Answer a request's body; the answer as the wrapper writes it to the processor's socket."""
        message = {
            "trigger": {"kind": "http", "name": "http"},
            "content_type": "application/json",
            "method": "POST",
            "path": "/",
            "url": "",
            "headers": {},
            "fields": {},
            "id": "0",
            "shard_id": 0,
            "num_shards": 0,
            "type": "",
            "type_version": "",
            "version": "",
            "timestamp": time.time(),
            "size": len(body),
            "body": body,
        }
        with self._stages("event"):
            event = nuclio_sdk.Event.deserialize(message, kind=nuclio_sdk.event.EventDeserializerKinds.msgpack)
        output = self._handler(self._context, event)
        with self._stages("encode"):
            reply = nuclio_sdk.Response.from_entrypoint_output(self._encode, output)
            packet: bytes = ("r" + self._encode(reply) + "\n").encode()
        return packet


def context() -> nuclio_sdk.Context:
    """A worker's context that logs to stderr."""
    logger = nuclio_sdk.Logger(logging.INFO)
    logger.set_handler("default", sys.stderr, nuclio_sdk.logger.HumanReadableFormatter())
    return nuclio_sdk.Context(logger, nuclio_sdk.Platform("local"), "0", nuclio_sdk.TriggerInfo("http", "http"))


def request(image: Path) -> bytes:
    """What CVAT posts for a picture."""
    return json.dumps({"image": base64.b64encode(image.read_bytes()).decode()}).encode()


def answer_of(packet: bytes) -> str:
    """The body of a packet that `Function` made."""
    reply = json.loads(packet[1:])
    if reply["status_code"] != 200:
        raise SystemExit(f"The function answered {reply['status_code']}: {reply['body'][:500]}")
    body: str = reply["body"]
    return body


def reference(
    *,
    checkpoint: str,
    names: list[str],
    scale: float,
    image: str,
    small: str,
    save: str,
    device: str,
    checkout: str | None = None,
) -> dict[str, Any]:
    """The reference path; writes `answer.json` and `map.npy` into the folder `save`."""
    import numpy as np
    from PIL import Image

    from benchmarks import reference as path
    from sscloud.stages import Stages

    Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound would refuse panoramas of 16384x8192
    if checkout:
        predictor: Any = path.Original(Path(checkout), Path(checkpoint), scale=scale, device=device)
    else:
        predictor = path.Reference(Path(checkpoint), scale=scale, device=device)
    clock = clock_of(device)
    stages = Stages(clock=clock)
    named = {index: name for index, name in enumerate(names) if index > 0}

    def handler(context: Any, event: Any) -> Any:
        body = path.answer(event.body, predict=predictor.predict, names=named, stages=stages)
        return context.Response(body=body, headers={}, content_type="application/json", status_code=200)

    function = Function(handler, context(), stages)
    function(request(Path(small)))
    body = request(Path(image))
    stages.milliseconds.clear()
    packet, spent = timed(lambda: function(body), clock)
    result = {**spent, "peak": peak_bytes(), "stages": dict(stages.milliseconds)}
    answer = answer_of(packet)
    Path(save, "answer.json").write_text(answer)
    best = predictor.predict(Image.open(image).convert("RGB"), Stages())
    np.save(Path(save, "map.npy"), best.astype(np.uint8))
    return {**result, "answer": len(answer)}


def ours(*, folder: str, image: str, small: str, save: str, device: str) -> dict[str, Any]:
    """A packaged function; writes `answer.json` and `map.npy` (class of each pixel) into the folder `save`.

    The first picture of a size is measured too: OpenVINO compiles the network for it.
    """
    sys.path.insert(0, folder)
    main = importlib.import_module("main")

    import numpy as np

    from sscloud.stages import Stages

    worker = context()
    main.init_context(worker)
    clock = clock_of(device)
    stages = Stages(clock=clock)
    function = Function(main.handler, worker, stages)
    function(request(Path(small)))
    body = request(Path(image))
    _, first = timed(lambda: function(body), clock)
    stages.milliseconds.clear()
    packet, spent = timed(lambda: function(body), clock)
    result = {**spent, "first": first["seconds"], "peak": peak_bytes()}
    answer = answer_of(packet)
    Path(save, "answer.json").write_text(answer)
    del packet
    model = worker.user_data.champion.model
    picture = Path(image).read_bytes()
    fields = json.loads(body)
    with stages("parse"):
        main.parse_request(fields, size=len(body), max_bytes=len(body))
    del fields
    model.annotate(picture, threshold=0.0, stages=stages)
    np.save(Path(save, "map.npy"), model._predictor.predict(picture).class_map)
    return {**result, "stages": stages.milliseconds, "answer": len(answer), "forward": model.describe()}


def logits(*, checkpoint: str, scale: float, image: str, save: str) -> dict[str, Any]:
    """The reference's logits at model scale, (C, h, w) float32, written to `save`."""
    import numpy as np
    from PIL import Image

    from benchmarks.reference import Reference
    from sscloud.stages import Stages

    found = Reference(Path(checkpoint), scale=scale, device="cpu").logits(Image.open(image).convert("RGB"), Stages())
    np.save(save, found[0].numpy())
    return {"shape": list(found[0].shape)}


def upsample(*, way: str, source: str, size_hw: list[int], save: str) -> dict[str, Any]:
    """Logits → class map at full size, by the reference or by ours; the map is written to `save`."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.load(source))
    if way == "reference":
        from benchmarks.reference import interpolate

        def work(part: Any, size: tuple[int, int]) -> Any:
            return interpolate(part[None], size)
    else:
        from sscloud.upsample import class_map

        def work(part: Any, size: tuple[int, int]) -> Any:
            return class_map(part.numpy(), size, wrap=False)

    work(values[:, :32, :64].contiguous(), (320, 640))
    height, width = size_hw
    (best, spent), extra = extra_peak(lambda: timed(lambda: work(values, (height, width))))
    np.save(save, best.astype(np.uint8))
    return {**spent, "extra": extra}


def cvat(*, answer: str) -> dict[str, Any]:
    """What CVAT pays for an answer."""
    from benchmarks.reference import cvat_runs

    body = Path(answer).read_bytes()
    ((pixels, runs), spent), extra = extra_peak(lambda: timed(lambda: cvat_runs(body)))
    return {**spent, "extra": extra, "pixels": pixels, "runs": runs}


def grown(*, folder: str, image: str, noise: float) -> dict[str, Any]:
    """Stages of one picture, with a share of the class map's pixels set at random."""
    sys.path.insert(0, folder)
    main = importlib.import_module("main")

    import dataclasses

    import numpy as np

    from sscloud.stages import Stages

    worker = context()
    main.init_context(worker)
    model = worker.user_data.champion.model
    predict = model._predictor.predict

    def noisy(*args: Any, **kwargs: Any) -> Any:
        segmentation = predict(*args, **kwargs)
        found = segmentation.class_map
        rng = np.random.default_rng(0)
        for row in found:  # whole maps of random numbers would be the largest arrays of all
            chosen = rng.random(len(row), np.float32) < noise
            row[chosen] = rng.integers(0, len(segmentation.label_ids), int(chosen.sum()), np.uint8)
        return dataclasses.replace(segmentation, class_map=found)

    if noise:
        model._predictor.predict = noisy
    stages = Stages(clock=time.process_time)
    answer, spent = timed(lambda: model.annotate(Path(image).read_bytes(), threshold=0.0, stages=stages))
    return {
        **spent,
        "stages": stages.milliseconds,
        "peak": peak_bytes(),
        "regions": answer.regions,
        "answer": len(answer.body),
    }


def worker(*, folder: str, image: str, count: int) -> dict[str, Any]:
    """Answers a picture `count` times, as soon as a line comes in; says so by a line of its own when it is ready."""
    sys.path.insert(0, folder)
    main = importlib.import_module("main")

    from sscloud.stages import Stages

    around = context()
    main.init_context(around)
    function = Function(main.handler, around, Stages())
    body = request(Path(image))
    function(body)
    print("ready", flush=True)
    sys.stdin.readline()
    _, spent = timed(lambda: [len(function(body)) for _ in range(count)])
    return {**spent, "peak": peak_bytes()}


def program(*, arguments: list[str]) -> dict[str, Any]:
    """A command of `sscloud`."""
    from tools.cli import main as cli

    if cli(arguments):
        raise SystemExit(f"sscloud {arguments} failed.")
    return {"peak": peak_bytes()}


def machine(*, image: str, device: str) -> dict[str, Any]:
    """What one core, or the GPU, can do at best: matrix products, copies, and entropy decoding of a picture."""
    import cv2
    import numpy as np
    import torch

    clock = clock_of(device)
    torch.set_num_threads(1)

    def quickest(work: Callable[[], Any]) -> float:
        def whole() -> None:
            work()
            if device != "cpu":
                torch.cuda.synchronize()

        return min(timed(whole, clock)[1]["seconds"] for _ in range(8))

    def rate(dtype: Any) -> float:
        size = 2048 if device == "cpu" else 8192
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / quickest(lambda: torch.mm(left, right))

    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    data = np.frombuffer(Path(image).read_bytes(), np.uint8)
    features = _cpu_features()
    bf16 = device != "cpu" or bool({"avx512_bf16", "amx_bf16"} & set(features))
    return {
        "features": features,
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(device),
        "fp32_flops": rate(torch.float32),
        "bf16_flops": rate(torch.bfloat16) if bf16 else None,
        "bytes_per_s": 2 * source.nbytes / quickest(lambda: target.copy_(source)),
        # Scaled down by 8 in the frequency domain, little but the Huffman codes is left of decoding.
        "huffman": quickest(lambda: cv2.imdecode(data, cv2.IMREAD_REDUCED_COLOR_8)),
    }


def _cpu_features() -> list[str]:
    """Those of the processor's features that decide which precisions are quick."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
    information = Path("/proc/cpuinfo")
    found = set(information.read_text().split()) if information.exists() else set()
    return [name for name in wanted if name in found]


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task for task in (reference, ours, logits, upsample, cvat, grown, worker, program, machine)
}


def main() -> None:
    """Run one task."""
    name, arguments = sys.argv[1:]
    print(json.dumps(TASKS[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
