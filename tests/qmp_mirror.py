"""Mirrors a disk and pivots with the `qemu.qmp` package from PyPI. Usage: qmp_mirror.py SOCKET

The daemon is the one of tests/qmp_library.rs. Prints what it sees; the test compares.
"""

import asyncio
import json
import sys

from qemu.qmp import ExecuteError, QMPClient


def show(what, value):
    print(what, json.dumps(value, sort_keys=True))


async def main(path):
    client = QMPClient("mirror")
    await client.connect(path)
    job = {"job-id": "m", "device": "disk", "target": "copy", "sync": "full"}
    try:
        await client.execute("blockdev-mirror", {**job, "granularity": 1000})
    except ExecuteError as error:
        show("refused", {"class": error.error_class, "desc": str(error)})
    ended = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
    with client.listener(("BLOCK_JOB_READY",) + ended) as listener:
        await client.execute("blockdev-mirror", job)
        async for event in listener:
            show(event["event"], event["data"])
            if event["event"] == "BLOCK_JOB_READY":
                show("exported before", await client.execute("query-block-exports"))
                await client.execute("job-complete", {"id": "m"})
            elif event["event"] in ended:
                break
    show("exported after", await client.execute("query-block-exports"))
    # Another name: the last events of the first job may still come.
    back = {**job, "job-id": "back", "device": "copy", "target": "disk", "speed": 1}
    with client.listener("JOB_STATUS_CHANGE", lambda event: event["data"]["id"] == "back") as listener:
        await client.execute("blockdev-mirror", back)
        await client.execute("job-cancel", {"id": "back"})
        states = []
        async for event in listener:
            states.append(event["data"]["status"])
            if states[-1] == "null":
                break
        show("given up", states)
    await client.disconnect()


asyncio.run(main(sys.argv[1]))
