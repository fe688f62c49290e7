"""Errors in the middle of a stream: the status is sent already, so that an event has to tell. Next: bodies.py."""

import logging
from collections.abc import AsyncIterator, Callable

from saccade.errors import SaccadeError
from saccade.server.bodies import write_event
from saccade.server.refusals import shape_error


def write_error(text: str) -> str:
    """As OpenAI's clients expect it."""
    return write_event(shape_error("", 500, text))


async def guarded(
    events: AsyncIterator[str], end: str = "", write: Callable[[str], str] = write_error
) -> AsyncIterator[str]:
    """`events`, then `end`. What they raise becomes a last event, by `write`."""
    try:
        async for event in events:
            yield event
    except SaccadeError as error:
        yield write(str(error))
    except Exception as error:  # a bug: the client is told, the log gets the traceback
        logging.getLogger("saccade").exception("a stream broke")
        yield write(f"a bug of the server: {type(error).__name__}")
    finally:
        await events.aclose()  # type: ignore[attr-defined]
    if end:
        yield end
