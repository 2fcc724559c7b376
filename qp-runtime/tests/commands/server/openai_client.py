"""Uses OpenAI's package on a server of the bundled model, named 'kjv': openai_client.py http://ADDRESS/v1"""
import asyncio
import json
import sys
import urllib.request
from typing import Literal

import openai
import pydantic

URL = sys.argv[1]
client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
PROMPT = "And it came to pass in those days, that"
MESSAGES = [{"role": "user", "content": PROMPT}]


def plain():
    assert [m.id for m in client.models.list()] == ["kjv"]
    whole = client.completions.create(model="kjv", prompt=PROMPT, max_tokens=10, temperature=0)
    text = whole.choices[0].text
    assert text and whole.usage.completion_tokens == 10 and whole.choices[0].finish_reason == "length"
    parts = client.completions.create(model="kjv", prompt=PROMPT, max_tokens=10, temperature=0, stream=True)
    assert "".join(p.choices[0].text for p in parts) == text
    report = client.completions.create(model="kjv", prompt=PROMPT, max_tokens=2, temperature=0, logprobs=3)
    assert len(report.choices[0].logprobs.tokens) == 2 and len(report.choices[0].logprobs.top_logprobs[0]) == 3
    return text


def chat(text):
    whole = client.chat.completions.create(model="kjv", messages=MESSAGES, max_tokens=10, temperature=0, seed=1,
                                           logprobs=True, top_logprobs=2, user="someone")
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == text
    assert len(choice.logprobs.content) == 10 and len(choice.logprobs.content[0].top_logprobs) == 2
    parts = client.chat.completions.create(model="kjv", messages=MESSAGES, max_tokens=10, temperature=0, stream=True,
                                           stream_options={"include_usage": True})
    got, usage = "", None
    for part in parts:
        usage = part.usage or usage
        got += "".join(c.delta.content or "" for c in part.choices)
    assert got == text and usage.completion_tokens == 10
    two = client.chat.completions.create(model="kjv", messages=MESSAGES, max_tokens=5, n=2, temperature=1, seed=3, stop=["zzz"],
                                         presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"5": -10}, top_p=0.9)
    assert [c.index for c in two.choices] == [0, 1]
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    formed = client.chat.completions.create(model="kjv", messages=MESSAGES, max_tokens=40, response_format=form, seed=1)
    assert isinstance(json.loads(formed.choices[0].message.content)["ok"], bool)
    extra = client.chat.completions.create(model="kjv", messages=MESSAGES, max_tokens=3, extra_body={"top_k": 1, "min_p": 0.1})
    assert text.startswith(extra.choices[0].message.content)


def helpers(text):
    """What the package builds on top of the interface."""
    class Answer(pydantic.BaseModel):
        ok: bool
        kind: Literal["a", "b"]

    parsed = client.chat.completions.parse(model="kjv", messages=MESSAGES, max_tokens=60, response_format=Answer, seed=2)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    # The helper takes an answer of the greatest length for an error.
    word = text.split()[3]
    with client.chat.completions.stream(model="kjv", messages=MESSAGES, temperature=0, logprobs=True, stop=word) as stream:
        deltas = "".join(e.delta for e in stream if e.type == "content.delta")
        final = stream.get_final_completion().choices[0]
    assert deltas == final.message.content == text[:text.index(word)] and final.finish_reason == "stop"
    assert "".join(t.token for t in final.logprobs.content).startswith(deltas)
    tool = openai.pydantic_function_tool(Answer, name="look_up")
    used = client.chat.completions.create(model="kjv", messages=MESSAGES, max_tokens=2, tools=[tool], tool_choice="auto")
    assert used.choices[0].message.tool_calls is None
    raw = client.chat.completions.with_raw_response.create(model="kjv", messages=MESSAGES, max_tokens=1)
    assert raw.status_code == 200 and raw.parse().choices
    assert client.models.retrieve("kjv").id == "kjv"


def many():
    """Several prompts, several answers, seeds and what ends an answer."""
    ask = dict(model="kjv", max_tokens=6, temperature=1.0)
    both = client.completions.create(prompt=["In the beginning", "And God said"], n=2, seed=5, **ask)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    again = client.completions.create(prompt=["In the beginning", "And God said"], n=2, seed=5, **ask)
    assert [c.text for c in both.choices] == [c.text for c in again.choices]
    assert both.choices[1].text == client.completions.create(prompt="In the beginning", seed=6, **ask).choices[0].text
    parts = {}
    for part in client.completions.create(prompt=["In the beginning", "And God said"], n=2, seed=5, stream=True, **ask):
        for c in part.choices:
            parts[c.index] = parts.get(c.index, "") + c.text
    assert [parts[i] for i in range(4)] == [c.text for c in both.choices]
    tokens = client.completions.create(prompt=[5, 6, 7], **ask)
    assert tokens.usage.prompt_tokens == 3
    word = both.choices[0].text.split()[1]
    ended = client.completions.create(prompt="In the beginning", seed=5, stop=word, **ask).choices[0]
    assert word not in ended.text and ended.finish_reason == "stop" and both.choices[0].text.startswith(ended.text)
    never = client.completions.create(model="kjv", prompt="And", max_tokens=1, temperature=0, logprobs=1).choices[0].logprobs.tokens[0]
    number = json.loads(urllib.request.urlopen(urllib.request.Request(
        URL.removesuffix("/v1") + "/tokenize", json.dumps({"text": never, "add_special_tokens": False}).encode(),
        {"Content-Type": "application/json"})).read())["tokens"][-1]
    other = client.completions.create(model="kjv", prompt="And", max_tokens=1, temperature=0, logprobs=1,
                                      logit_bias={str(number): -100})
    assert other.choices[0].logprobs.tokens[0] != never


def errors():
    def fails(kind, **parameters):
        try:
            client.chat.completions.create(**{"model": "kjv", "messages": MESSAGES, **parameters})
        except kind as e:
            return e
        raise AssertionError(f"{parameters} did not fail with {kind}")

    assert fails(openai.BadRequestError, temperature=-1).param == "temperature"
    assert fails(openai.BadRequestError, max_tokens=10**6).code == "context_length_exceeded"
    assert fails(openai.NotFoundError, model="other").code == "model_not_found"
    assert fails(openai.BadRequestError, messages=[]).param == "messages"
    assert fails(openai.BadRequestError, logit_bias={"99999": 1}).param == "logit_bias"
    assert fails(openai.BadRequestError, tool_choice="required").param == "tool_choice"
    assert fails(openai.BadRequestError, stop=["x"] * 17).param == "stop"
    assert fails(openai.BadRequestError, extra_body={"no_such": 1}).code == "unsupported_parameter"
    try:
        client.embeddings.create(model="kjv", input="x")
        raise AssertionError("embeddings were made")
    except openai.BadRequestError:
        pass


async def at_once(text):
    other = openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0)

    async def streamed():
        parts = await other.chat.completions.create(model="kjv", messages=MESSAGES, max_tokens=10, temperature=0, stream=True)
        return "".join([c.delta.content or "" async for p in parts for c in p.choices])

    async def whole():
        return (await other.completions.create(model="kjv", prompt=PROMPT, max_tokens=10, temperature=0)).choices[0].text

    assert set(await asyncio.gather(*(f() for f in [streamed, whole] * 8))) == {text}
    # A stream that is closed early.
    stream = await other.chat.completions.create(model="kjv", messages=MESSAGES, max_tokens=500, stream=True)
    async for _ in stream:
        break
    await stream.close()
    # A request that is given up while it is computed.
    task = asyncio.create_task(other.completions.create(model="kjv", prompt=PROMPT, max_tokens=500, extra_body={"ignore_eos": True}))
    await asyncio.sleep(0.2)
    task.cancel()
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
    await other.close()


text = plain()
chat(text)
helpers(text)
many()
errors()
asyncio.run(at_once(text))
print("all as expected")
