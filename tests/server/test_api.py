"""The API through the official client, and through requests as other programs send them."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from serving import ServerProcess

import megalith

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["m", "ft"]}},
            "required": ["x", "unit"],
            "additionalProperties": False,
        },
    },
}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_the_official_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=12, temperature=0)
    pieces = list(client.completions.create(model="tiny", prompt="Hello", max_tokens=12, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=9, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_a_chat_stream_has_role_first_and_usage_last(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=9, seed=3, stream=True, stream_options={"include_usage": True}, n=2
        )
    )
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    ended = [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert {choice.index for choice in ended} == {0, 1}
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, seed=3, n=2)
    for index in (0, 1):
        parts = [c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(parts) == whole.choices[index].message.content
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_the_asynchronous_client(server: ServerProcess) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=20, seed=number, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*(one(number % 4) for number in range(16))))

    texts = asyncio.run(ask())
    assert texts[:4] * 4 == texts
    assert len(set(texts)) == 4


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_tools(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=300, seed=1, parallel_tool_calls=False
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    call: Any = calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "add"
    assert 0 <= arguments["x"] <= 99
    assert arguments["unit"] in ("m", "ft")
    again: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "5"},
    ]
    assert client.chat.completions.create(model="tiny", messages=again, tools=[TOOL], max_tokens=3, seed=1).choices


def test_tools_while_streaming(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=300, seed=1, stream=True,
            parallel_tool_calls=False,
        )
    )  # fmt: skip
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == [0]
    function = calls[0].function
    assert function is not None
    assert set(json.loads(function.arguments or "")) == {"x", "unit"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8, "pattern": "^[a-z]*$"},
            "age": {"type": "integer", "maximum": 120, "minimum": 0},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }  # fmt: skip
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    for seed in range(5):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=100, seed=seed, response_format=wanted
        )
        assert answer.choices[0].finish_reason == "stop"
        value = json.loads(answer.choices[0].message.content or "")
        assert 0 <= value["age"] <= 120
        assert len(value["name"]) <= 8


def test_json_object_begins_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=30, seed=1, response_format={"type": "json_object"}
    )
    assert (answer.choices[0].message.content or "").startswith("{")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="x" * 3000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="tiny", prompt="x", suffix="y")


def test_lm_eval_requests(server: ServerProcess) -> None:
    """Log likelihoods of continuations, as lm-eval's local-completions asks for them."""
    engine = megalith.load(str(server.process.args[5]))  # type: ignore[index]
    batch = [[16 + i for i in b"The sky is blue"], [16 + i for i in b"The grass is green, and more"]]
    body = {"model": "tiny", "prompt": batch, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = server.json("POST", "/v1/completions", body)
    for ids, choice in zip(batch, answer["choices"], strict=True):
        logits = engine.logits(ids).astype(np.float64)
        table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        expected = [table[i, ids[i + 1]] for i in range(len(ids) - 1)]
        assert np.allclose(logprobs["token_logprobs"][1:-1], expected, atol=1e-4)
        tops = [max(top.values()) for top in logprobs["top_logprobs"][1:-1]]
        assert np.allclose(tops, table[:-1].max(axis=1), atol=1e-4)
        assert len(logprobs["tokens"]) == len(ids) + 1
    nothing = server.json("POST", "/v1/completions", {**body, "max_tokens": 0})
    assert [len(choice["logprobs"]["tokens"]) for choice in nothing["choices"]] == [len(ids) for ids in batch]


def test_vllm_bench_requests(server: ServerProcess) -> None:
    """A stream as `vllm bench serve` reads it: every line an event, usage in the last one."""
    body = {
        "model": "tiny", "prompt": "hello " * 20, "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 32,
        "logprobs": None, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    status, headers, data = server.request("POST", "/v1/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    lines = [line for line in data.decode().split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["usage"]["completion_tokens"] == 32


def test_a_seeded_request_is_the_same_alone_and_among_63_others(server: ServerProcess) -> None:
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 40,
        "seed": 11,
        "temperature": 1.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    alone = server.complete(**body)["choices"][0]["token_ids"]

    def one(number: int) -> Any:
        if number == 31:
            return server.complete(**body)["choices"][0]["token_ids"]
        return server.complete(prompt=f"{number} " * (number + 1), max_tokens=30 + number % 20, seed=number, ignore_eos=True)

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(one, range(64)))[31] == alone
    assert len(alone) == 40


def test_stop_strings_end_before_them(server: ServerProcess) -> None:
    text = server.complete(prompt="abc", max_tokens=40, temperature=0, ignore_eos=True)["choices"][0]["text"]
    stop = text[10:13]
    choice = server.complete(prompt="abc", max_tokens=40, temperature=0, ignore_eos=True, stop=[stop])["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text[: text.index(stop)]


def test_penalties_and_bias_change_what_is_generated(server: ServerProcess) -> None:
    def ids(**more: Any) -> list[int]:
        found: list[int] = server.complete(
            prompt="abc", max_tokens=24, temperature=0, ignore_eos=True, return_token_ids=True, **more
        )["choices"][0]["token_ids"]
        return found

    plain = ids()
    assert len(set(ids(presence_penalty=2, frequency_penalty=2))) > len(set(plain))
    assert plain[0] not in ids(logit_bias={str(plain[0]): -100})
    assert set(ids(logit_bias={"65": 100})) == {65}


def test_tokenize_and_back(server: ServerProcess) -> None:
    text = "Grüße, 世界"
    found = server.json("POST", "/tokenize", {"prompt": text, "return_token_strs": True})
    assert found["count"] == len(text.encode())
    assert server.json("POST", "/detokenize", {"tokens": found["tokens"]})["prompt"] == text
    chat = server.json("POST", "/tokenize", {"messages": MESSAGES})
    assert server.json("POST", "/detokenize", {"tokens": chat["tokens"]})["prompt"] == "[user]Hi[assistant]"


def test_a_second_prompt_with_the_same_beginning_finds_its_pages(server: ServerProcess) -> None:
    prompt = "A prefix that is long enough to fill more than one page of the cache. " * 3
    server.complete(prompt=prompt, max_tokens=1)
    usage = server.complete(prompt=prompt + "And more", max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(prompt) // 64 * 64


def test_choices_of_one_prompt_share_its_prefill_which_is_counted_once(server: ServerProcess) -> None:
    prompt = "Another prefix, of its own, that fills more than one page of the cache. " * 3
    usage = server.complete(prompt=prompt, max_tokens=1, n=4)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    _, _, text = server.request("GET", "/metrics")
    found = next(line for line in text.decode().splitlines() if line.startswith("megalith_prefix_cache_hit_tokens_total "))
    assert float(found.split()[1]) >= 3 * (len(prompt) // 64 * 64)
    again = server.complete(prompt=prompt, max_tokens=1, n=4)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == len(prompt) // 64 * 64


def test_json_by_a_grammar_reports_the_models_own_log_probabilities(server: ServerProcess) -> None:
    """A grammar says that the first token is a brace; without one the same logits give it the same log probability."""
    chat = {"messages": MESSAGES, "max_tokens": 1, "logprobs": True, "top_logprobs": 5, "temperature": 0}
    free = server.json("POST", "/v1/chat/completions", chat)["choices"][0]["logprobs"]["content"][0]
    held = server.json("POST", "/v1/chat/completions", {**chat, "response_format": {"type": "json_object"}})
    held = held["choices"][0]["logprobs"]["content"][0]
    assert held["token"] == "{"
    assert free["token"] != "{"
    assert held["top_logprobs"] == free["top_logprobs"]
    assert held["logprob"] < free["logprob"]


def test_other_routes(server: ServerProcess) -> None:
    assert server.json("GET", "/version")["version"] == megalith.__version__
    assert server.json("GET", "/tokenizer_info")["vocab_size"] == 272
    _, _, text = server.request("GET", "/metrics")
    for name in ("requests_queued", "requests_running", "kv_usage_ratio", "time_to_first_token_seconds_count",
                 "inter_token_latency_seconds_bucket", "generation_tokens_total", "prompt_tokens_total"):  # fmt: skip
        assert f"megalith_{name}".encode() in text
