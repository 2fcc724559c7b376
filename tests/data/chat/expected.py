#!/usr/bin/env python3
"""Writes expected.json: what Jinja2, set up as transformers sets it up, makes of the templates beside this file.

Usage: expected.py > expected.json (needs Jinja2; made with 3.1.6)
"""
import json
import pathlib
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.ext import Extension
from jinja2 import TemplateError
from jinja2.nodes import Scope


class Marks(Extension):
    """The blocks by which training finds an assistant's words."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


def raise_exception(message):
    raise TemplateError(message)


env = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Marks, "jinja2.ext.loopcontrols"]
)
env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
)
env.globals["raise_exception"] = raise_exception

SYSTEM = {"role": "system", "content": "  Be brief & kind.\n"}
USER = {"role": "user", "content": "What is 'it' <b>? "}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is a pronoun."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"word": "Äa", "n": 2, "x": 0.5}}}],
}
RESULT = {"role": "tool", "content": "found"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks <up> a \"word\".",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string"},
                    "n": {"type": "array", "items": {"type": "integer", "nullable": True}},
                    "kind": {"enum": ["a", "b"]},
                },
                "required": ["word"],
            },
        },
    }
]
DIALOGUES = {
    "one": ([USER], None),
    "system": ([SYSTEM, USER], None),
    "long": ([SYSTEM, USER, ANSWER, USER], None),
    "tools": ([SYSTEM, USER, CALL, RESULT], TOOLS),
    "tools without system": ([USER], TOOLS),
    "twice": ([USER, USER], None),
    "thought": ([USER, ANSWER], None),
    "control": ([USER, ANSWER, SYSTEM, USER, {"role": "stop", "content": ""}, USER], None),
}

here = pathlib.Path(__file__).parent
out = []
for path in sorted(here.glob("*.jinja")):
    template = env.from_string(path.read_text())
    for name, (messages, tools) in DIALOGUES.items():
        for variables in ({"date_string": "1 May 2026"}, {"date_string": "x", "enable_thinking": False}):
            case = {"template": path.name, "dialogue": name, "messages": messages, "tools": tools, "variables": variables}
            try:
                case["text"] = template.render(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=True,
                    bos_token="<s>", eos_token="</s>", **variables,
                )
            except TemplateError as e:
                case["error"] = str(e)
            out.append(case)
print(json.dumps(out, indent=1, ensure_ascii=False))
