"""Runs the cases of the Autobahn suite with kosoku against a WebSocket service. Argument: its port.

It prints a line for each case: its id, a tab, and its outcome. A failed case is a result like any
other; the test that reads the lines decides.

All cases on framing, UTF-8 and closing are run (1 to 7, and 10), and all on large and many messages
(9). Those on compression (12 and 13) are 216 that differ by size, and take minutes: of each of their
twelve settings, the first size is run, and the one that is also sent in fragments."""
import asyncio
import os
import sys

from kosoku import FailureError, run_fuzzingclient

WHOLE = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*"]
SETTINGS = [f"12.{setting}" for setting in range(1, 6)] + [f"13.{setting}" for setting in range(1, 8)]
SIZES = [1, 11]
AT_ONCE = 4


async def results():
    url = f"ws://127.0.0.1:{sys.argv[1]}/"
    compression = [f"{setting}.{size}" for setting in SETTINGS for size in SIZES]
    try:
        return await run_fuzzingclient(url, WHOLE + compression, concurrency=AT_ONCE)
    except FailureError as failure:
        # It holds those that passed as well.
        return failure.results


def verdict(result):
    """Where a case sends nonsense behind a good message, both answering that one and not are right, and
    which of them happens hangs on how the service's reads cut the bytes: it is no difference."""
    said = result.behavior.value
    return "OK or NON-STRICT" if said in ("OK", "NON-STRICT") and "NON-STRICT" in result.expected else said


def outcome(result):
    """What does not hang on the time that the bytes took."""
    words = [verdict(result), result.behavior_close.value]
    words.append(f"closed with {result.remote_close_code} {result.remote_close_reason or ''}".strip())
    words.append("clean" if result.was_clean else f"unclean: {result.was_not_clean_reason}")
    # A service ends its TCP connection first: RFC 6455, section 7.1.1.
    if result.was_server_connection_drop_timeout:
        words.append("the connection was left open")
    return ", ".join(words)


for each in asyncio.run(results()):
    print(f"{each.case_id}\t{outcome(each)}")
sys.stdout.flush()
# All is said. The runner's own threads may still be ending, and when the interpreter ends under them they
# abort the process.
os._exit(0)
