"""Uses OpenAI's package on a server of the bundled model, named 'kjv': openai_client.py http://ADDRESS/v1"""
import asyncio
import json
import sys

import openai

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


text = plain()
chat(text)
errors()
asyncio.run(at_once(text))
print("all as expected")
