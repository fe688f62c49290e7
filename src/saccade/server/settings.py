"""What a user may set of a server: where it listens, who may ask, and its limits.

Knows neither HTTP nor models. Next: run.py, which starts a server with them.
"""

import re
from dataclasses import dataclass

from saccade.base.values import is_count, is_number, show
from saccade.errors import ConfigError

MIB = 1 << 20
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#]+")  # as browsers send it; any other one never matches


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server; times are in seconds.

    - `chat_template`: the text of one, in place of the model's own.
    - `names`: what clients may call the model; the first is the one that answers carry. (): the model's path or id.
    - `api_keys`: one of them must come with each request; (): nobody is asked.
    - `origins`: web pages whose scripts may ask, "https://example.org" or "*"; (): none.
    - `ignored_fields`: of requests, which are dropped before these are read; "messages.name" is one of each message.
    - `max_queue`: requests that may wait beyond those that run; others get 429.
    - `max_body`: bytes of a request's body.
    - `max_prompts`: prompts of one request, times `n`.
    - `header_timeout`, `body_timeout`: in which the headers, and then the body, must have come.
    - `keep_alive`: how long an idle connection stays open.
    - `grace`: how long running answers go on after TERM.
    - `engine_timeout`: after which an engine that does not end its step counts as failed. The first steps on a GPU
      compile kernels, which takes minutes.
    - `red_time`: how long a server whose engine has failed answers with errors, before it ends with code 1.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    chat_template: str | None = None
    names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    ignored_fields: tuple[str, ...] = ()
    max_queue: int = 256
    max_body: int = 16 * MIB
    max_prompts: int = 1024
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    keep_alive: float = 75.0
    grace: float = 30.0
    engine_timeout: float = 900.0
    red_time: float = 10.0

    def __post_init__(self) -> None:
        if not (is_count(self.port, 0) and self.port < 1 << 16):
            raise ConfigError(f"port: expected an integer from 0 (any free one) to 65535, found {show(self.port)}")
        for name in ("max_queue", "max_body", "max_prompts"):
            if not is_count(getattr(self, name), 1):
                raise ConfigError(f"{name}: expected an integer of at least 1, found {show(getattr(self, name))}")
        for name in ("header_timeout", "body_timeout", "keep_alive", "grace", "engine_timeout", "red_time"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ConfigError(f"{name}: expected seconds, a number of at least 0, found {show(value)}")
        for origin in self.origins:
            if not ORIGIN.fullmatch(origin):
                text = (
                    'expected "*", or scheme and host like "https://example.org:8443", without a path or "/" at the end'
                )
                raise ConfigError(f"origins: {text}, found {show(origin)}")
        if any(not key.strip() for key in self.api_keys):
            raise ConfigError("api_keys: expected texts that are not empty; an unset variable would let everybody in")
