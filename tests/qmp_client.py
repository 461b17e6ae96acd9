"""Drives a monitor with the `qemu.qmp` package from PyPI. Usage: qmp_client.py SOCKET

The monitor is the one of tests/as_qemu_qmp.rs. Prints what it sees; the test compares.
"""

import asyncio
import json
import sys

from qemu.qmp import ExecuteError, QMPClient


def show(what, value):
    print(what, json.dumps(value, sort_keys=True))


async def main(path):
    client = QMPClient("test")
    await client.connect(path)
    show("greeting", client.greeting._asdict())
    show("version", await client.execute("query-version"))
    with client.listener("DONE") as listener:
        show("say", await client.execute("say", {"text": "h\u00e9 \U0001f600"}))
        event = await listener.get()
        show("event", {"event": event["event"], "data": event["data"]})
    try:
        await client.execute("block-job-set-speed", {"device": "x", "speed": "fast"})
    except ExecuteError as error:
        show("error", {"class": error.error_class, "desc": str(error)})
    # Several at once: answers are matched by their ids.
    both = await asyncio.gather(client.execute("say", {"text": "1"}), client.execute("say", {"text": "2"}))
    show("both", both)
    show("oob", await client.execute("ping", oob=True))
    schema = await client.execute("query-qmp-schema")
    show("schema", sorted(entity["name"] for entity in schema if entity["meta-type"] == "event"))
    await client.disconnect()


asyncio.run(main(sys.argv[1]))
