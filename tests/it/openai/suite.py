"""The official OpenAI client against a node, unmodified: python suite.py BASE_URL

The instances are made by tests/it/openai.rs: `echo` answers with what it is told, `slow` streams "one two three four",
`weather` asks for the client's tool `look` and then says what it saw. Ends with `ok` and exit status 0, or with a traceback.
"""

import asyncio
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=60)
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at the thermometer.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def say(model, text, **more):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **more)


def answers():
    answer = say("echo", "hello")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "hello"), answer
    assert (choice.finish_reason, answer.model, answer.object) == ("stop", "echo", "chat.completion"), answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, answer
    assert answer.id.startswith("chatcmpl-") and answer.created > 1_700_000_000, answer
    assert answer._request_id, "x-request-id is told"


def streams():
    chunks = list(say("slow", "count", stream=True, stream_options={"include_usage": True}))
    words = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(words) == "one two three four" and len(words) > 1, words
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop", chunks[-2]
    assert chunks[-1].usage.completion_tokens == 4 and not chunks[-1].choices, chunks[-1]
    assert len({chunk.id for chunk in chunks}) == 1, "all are of one answer"
    # An engine that decides at once has one chunk of words.
    words = [chunk.choices[0].delta.content or "" for chunk in say("echo", "at once", stream=True)]
    assert "".join(words) == "at once", words
    # The helper that puts a stream together.
    with client.chat.completions.stream(model="slow", messages=[{"role": "user", "content": "count"}]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "one two three four", final


def tools(stream):
    messages = [{"role": "user", "content": "how warm is it?"}]
    if stream:
        calls = {}
        for chunk in client.chat.completions.create(model="weather", messages=messages, tools=[LOOK], stream=True):
            for call in chunk.choices[0].delta.tool_calls or []:
                calls[call.index] = (call.id, call.function.name, call.function.arguments)
            finish = chunk.choices[0].finish_reason
        ((call, name, arguments),) = calls.values()
        spoken = {"role": "assistant", "content": None, "tool_calls": [
            {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}]}
    else:
        choice = client.chat.completions.create(model="weather", messages=messages, tools=[LOOK]).choices[0]
        finish, spoken = choice.finish_reason, choice.message
        (first,) = choice.message.tool_calls
        call, name, arguments = first.id, first.function.name, first.function.arguments
    assert (finish, name, arguments) == ("tool_calls", "look", '{"city":"Oslo"}'), (finish, name, arguments)
    messages += [spoken, {"role": "tool", "tool_call_id": call, "content": "21 degrees"}]
    answer = client.chat.completions.create(model="weather", messages=messages, tools=[LOOK])
    assert answer.choices[0].message.content == "It is mild.", answer
    assert answer.usage.prompt_tokens == 100, answer.usage


def models():
    assert {"echo", "slow", "weather"} <= {model.id for model in client.models.list()}
    model = client.models.retrieve("echo")
    assert (model.id, model.object, model.owned_by) == ("echo", "model", "default"), model


def vectors():
    texts = ["the lamp in the hall", "lamps of the halls", "a boat on the lake"]
    one, other, third = (item.embedding for item in client.embeddings.create(model="lexical", input=texts).data)
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    assert len(one) == 256 and dot(one, other) > 2 * dot(one, third), (dot(one, other), dot(one, third))
    plain = client.embeddings.create(model="lexical", input=texts[0], encoding_format="float")
    assert max(abs(a - b) for a, b in zip(plain.data[0].embedding, one)) < 1e-6
    assert plain.usage.prompt_tokens == 5, plain.usage


def refusals():
    def refused(kind, code, act):
        try:
            act()
        except kind as error:
            assert error.code == code and error.body["message"] and error.request_id, (error.body, error.request_id)
        else:
            raise AssertionError(f"{kind} was due")

    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    refused(openai.BadRequestError, "invalid", lambda: say("echo", image))
    refused(openai.BadRequestError, "id_invalid", lambda: say("no such name", "x"))
    refused(openai.BadRequestError, "invalid", lambda: say("echo", "x", n=2))
    refused(openai.NotFoundError, "instance_not_found", lambda: client.models.retrieve("nobody"))
    refused(openai.UnprocessableEntityError, "dead_letter", lambda: say("poor", "x"))


def repeats():
    headers = {"Idempotency-Key": "once"}
    first, second = (say("echo", text, extra_headers=headers) for text in ("first", "second"))
    assert first.id == second.id == "chatcmpl-once", (first.id, second.id)
    assert second.choices[0].message.content == "first", second


async def many():
    async with openai.AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0) as other:
        texts = [str(n) for n in range(20)]
        asked = [other.chat.completions.create(model=f"echo-{text}", messages=[{"role": "user", "content": text}]) for text in texts]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)] == texts


answers()
streams()
tools(stream=False)
tools(stream=True)
models()
vectors()
refusals()
repeats()
assert asyncio.run(many())
print("ok")
