"""Settings in messages as the command line writes them."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from niwaki.errors import Setting

BUDGET = ("keep", "of", "floor", "multiple")
"""Parts of a budget that --budget says at once."""


def writer(command: Any, arguments: Sequence[str]) -> Callable[[Setting], str]:
    """How the command that `arguments` name writes a setting: its option, a field of --set, or as Python does.

    Args:
        command: niwaki as click knows it.
    """
    known = getattr(command, "commands", {})
    named = known.get(next((word for word in arguments if not word.startswith("-")), ""))  # niwaki's own are flags
    options = {one.name: one for one in getattr(named, "params", ()) if one.param_type_name == "option"}
    at_once = any(word.split("=", 1)[0] == "--budget" for word in arguments)

    def write(setting: Setting) -> str:
        if at_once and setting.name in BUDGET and setting.value is not None:
            return f"{setting.name}={setting.value}"
        option = options.get(setting.name)
        if option is not None:
            flag = max(option.opts, key=len)
            if setting.value is None or setting.value is True:
                return flag
            return f"no {flag}" if setting.value is False else f"{flag} {setting.value}"
        if "settings" in options and setting.value is not None and not setting.written:
            value = setting.value if isinstance(setting.value, str) else json.dumps(setting.value)
            return f"--set {setting.name}={value}"
        return str(setting)

    return write
