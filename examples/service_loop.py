"""A service around one Engine: requests come as JSON lines on stdin, answers go as JSON lines to stdout, in the order they end.

    printf '%s\n' '{"feature": "blocks.5:sae:1169", "num": 2, "lam": 0.8, "steps": 10}' | python examples/service_loop.py out

Whatever a real service speaks (HTTP, a queue), its loop is this one: submit, await, answer; a request that cannot be met says why
and touches no other.
"""

import asyncio
import json
import sys
from pathlib import Path

import tiltscope


async def answer(engine: tiltscope.Engine, number: int, line: str, out: Path) -> None:
    """One request, from its line to its answer."""
    try:
        asked = json.loads(line)
        samples = await engine.sample(asked.pop("feature"), deadline_s=600, **asked)
    except (tiltscope.errors.TiltscopeError, json.JSONDecodeError, KeyError) as error:
        print(json.dumps({"request": number, "error": str(error)}), flush=True)
        return
    folder = await asyncio.to_thread(samples.save, out / f"{number:04d}")
    activation = samples.activation.tolist()
    print(json.dumps({"request": number, "folder": str(folder), "activation": activation}), flush=True)


async def serve(out: Path) -> None:
    """Until stdin ends; what was asked by then is answered."""
    with tiltscope.Engine(tiltscope.load("emoji64"), max_batch=8) as engine:
        async with asyncio.TaskGroup() as tasks:
            number = 0
            while line := await asyncio.to_thread(sys.stdin.readline):
                tasks.create_task(answer(engine, number, line, out))
                number += 1


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1] if len(sys.argv) > 1 else "service-out")))
