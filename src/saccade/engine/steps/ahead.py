"""When a step is launched before the one in front of it has been read.

Then the host works for one step while the device computes the other. What it costs: a request that ends at a token that
nobody foresaw is computed once more for nothing, and one that comes meanwhile waits for a step more. Knows no tensor.
Next: engine.py, which asks before each step.
"""

from saccade.base.values import show
from saccade.errors import ConfigError

# Requests that decode, from which on it pays. Tokens a second of the bundled model on an H200 with 1, 16, 64 and 256
# clients (`saccade bench engine --clients 1,16,64,256 --output 128 --ahead on`, and `off`):
#   greedy    one by one 3,240, 28,798, 64,786 and 99,054; ahead 3,046, 29,418, 76,801 and 113,099
#   sampled   one by one 2,744, 25,657, 57,255 and 92,088; ahead 2,462, 30,112, 66,357 and 105,411
# Numbers between 1 and 16 were not measured.
LEAST_DECODES = 16

# Name of the setting -> how many requests must decode in a step that is launched ahead; None: no step is. Each rank
# decides by its own scheduler, which is that of all ranks: so they decide alike without a word.
LAUNCH_AHEAD: dict[str, int | None] = {"auto": LEAST_DECODES, "on": 0, "off": None}


def check_launch_ahead(launch_ahead: object, name: str = "launch_ahead") -> str:
    """ "auto", "on" or "off"; ConfigError for anything else. `name`: what the user calls it."""
    if not (isinstance(launch_ahead, str) and launch_ahead in LAUNCH_AHEAD):
        raise ConfigError(f'{name}: expected "auto", "on" or "off", found {show(launch_ahead)}')
    return launch_ahead


def choose_launch_ahead(launch_ahead: object, kind: str, name: str = "launch_ahead") -> str:
    """The same for a device of this kind: "auto" is "off" on a CPU, which computes a step while it launches it, so that
    each token would only come a step later."""
    asked = check_launch_ahead(launch_ahead, name)
    return "off" if (asked, kind) == ("auto", "cpu") else asked
