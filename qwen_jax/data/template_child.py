# SPDX-License-Identifier: Apache-2.0
"""The process in which chat templates run: `sandbox.Sandbox` starts it as a script.

    python -I template_child.py FOLDERS CPU_S MEMORY_BYTES OUTPUT_CHARS

A template is a stranger's program. Jinja's sandbox keeps it from attributes, files and
changes of what it is given, and nothing keeps it from endless loops and huge strings:
hence a process with limits. Here: CPU time of each rendering by a timer whose signal
ends the process, memory by RLIMIT_AS above what the interpreter takes, no files
written, no new processes, an environment without secrets.

What templates see is what transformers (5.x) gives them: trim_blocks and lstrip_blocks,
loop controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`,
`namespace` and `dict`, and the tag `generation`, whose content is rendered.

Format: messages on standard input and output are 8 bytes of length (little-endian) and
JSON. A request is {"template", "variables"}; an answer {"text"} or {"error", "kind"}, a
kind being "refused" (the template's raise_exception), "syntax", "limit" or "failed".
Raises: nothing; ends with standard input, or by a signal.
"""

import datetime
import functools
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

sys.path += sys.argv[1].split(os.pathsep) if __name__ == "__main__" else []

import jinja2
import jinja2.debug  # else imported where memory has run out
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

# What a template's own code may raise; the rest ends the process.
FAILURES = (
    *(jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError),
    *(LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)


class Refusal(jinja2.TemplateError):
    """What raise_exception raises."""


class TooLong(ValueError):
    """More text than OUTPUT_CHARS."""


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox; what reaches for an attribute that is not allowed ends there, where
    Jinja's own goes on with an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse at once."""
        raise jinja2.exceptions.SecurityError(
            f"the attribute {attribute!r} of {type(obj).__name__} is not allowed"
        )


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, which marks what an assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """The statements in between, in a scope of their own as transformers has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_same")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **names: Any):
        self, rest = args[0], args[1:]
        given = dict(*rest, **names)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **names: Any) -> dict:
        return dict(*args, **names)

    def fromkeys(self, *args: Any) -> dict:
        """dict.fromkeys."""
        return dict.fromkeys(*args)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no {name!r}")


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """json.dumps with transformers' defaults."""
    return json.dumps(
        x,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: Any) -> None:
    """What a template calls to refuse a conversation."""
    raise Refusal(str(message))


def strftime_now(form: str) -> str:
    """The local time."""
    return datetime.datetime.now().strftime(form)


def environment() -> jinja2.Environment:
    """The sandbox that templates are compiled in."""
    made = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Namespace,
        "dict": Dict(),
    }
    return made


def render(template: jinja2.Template, variables: dict, output_chars: int) -> str:
    """The text of a template, given up as soon as it is too long."""
    parts, length = [], 0
    for part in template.generate(**variables):
        length += len(part)
        if length > output_chars:
            raise TooLong(f"more than {output_chars:,} characters of text")
        parts.append(part)
    return "".join(parts)


def answer(compiled: Any, request: dict, output_chars: int) -> dict[str, str]:
    """One request -> its answer."""
    try:
        template = compiled(request["template"])
        return {"text": render(template, request["variables"], output_chars)}
    except Refusal as error:
        return {"kind": "refused", "error": str(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "error": f"line {error.lineno}: {error.message}"}
    except (MemoryError, RecursionError, TooLong) as error:
        words = str(error) or "more memory than it may take"
        return {"kind": "limit", "error": words}
    except FAILURES as error:
        return {"kind": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}


def _read(file: BinaryIO) -> dict | None:
    head = file.read(8)
    if len(head) < 8:
        return None
    return json.loads(file.read(struct.unpack("<Q", head)[0]))


def _write(file: BinaryIO, message: dict) -> None:
    data = json.dumps(message).encode()
    file.write(struct.pack("<Q", len(data)) + data)
    file.flush()


def _limit(memory_bytes: int) -> None:
    """Memory above what is taken now; nothing written, no processes, no core."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = taken + memory_bytes
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))


def main(cpu_s: float, memory_bytes: int, output_chars: int) -> None:
    """Answer requests until standard input ends."""
    compiled = functools.lru_cache(maxsize=16)(environment().from_string)
    strftime_now("%c %Z")  # reads the time zone
    _limit(memory_bytes)
    # A program that ignores or blocks the timer's signal, as a profiler's library may,
    # hands that down to its children.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    _write(stdout, {"text": "ready"})
    while True:
        # Reading counts, too: a request may be large. The signal's default ends us.
        request = _read(stdin)
        if request is None:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        reply = answer(compiled, request, output_chars)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(stdout, reply)


if __name__ == "__main__":
    main(float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
