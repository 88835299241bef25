"""What the serving benchmark relies on: clients that see everything, figures that follow from replies, a soak that
notices what must not be."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def event(content):
    return b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = [
    event({"choices": [{"text": ""}]}),
    event({"choices": [{"text": "a"}]}),
    b": still at work\n\n",
    event({"choices": [{"text": "b"}]}),
    event({"choices": [], "usage": {"completion_tokens": 3}}),
]


def chunk(part):
    return f"{len(part):x}\r\n".encode() + part + b"\r\n"


def reply_to(*parts, pause_s=0.0):
    """What a client makes of a server that sends these parts."""
    from serving_client import Address, offer, post

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert json.loads(await reader.readexactly(length)) == {"a": 1}
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        writer.close()

    async def both():
        from inference_cases import Arrival

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            address = Address(server.sockets[0].getsockname()[1])
            return await offer(address, [Arrival(0.05, 1, 1)], [post("/x", {"a": 1})])

    (reply,) = asyncio.run(both())
    return reply


class TestClient:
    def test_a_whole_stream(self):
        whole = b"".join([*EVENTS, event(b"[DONE]")])
        # Pieces that end anywhere, as networks have them.
        parts = [HEAD, *(chunk(whole[i : i + 17]) for i in range(0, len(whole), 17)), chunk(b"")]
        reply = reply_to(*parts, pause_s=0.005)
        assert (reply.status, reply.is_answered, reply.n_tokens, len(reply.times_s)) == (200, True, 3, 2)
        assert 0 < reply.first_s < reply.times_s[1] < reply.done_s < 1
        assert reply.per_token_s == pytest.approx((reply.times_s[1] - reply.first_s) / 2)
        assert reply.ended_s == pytest.approx(reply.done_s + 0.05)

    @pytest.mark.parametrize(
        ("parts", "error"),
        [
            ([HEAD, *map(chunk, EVENTS), chunk(b"")], "the stream broke off"),
            ([HEAD, chunk(EVENTS[1])], "IncompleteReadError"),
            ([HEAD, chunk(event({"error": {"message": "too slow"}})), chunk(b"")], "too slow"),
            ([], "IncompleteReadError"),
        ],
    )
    def test_streams_that_break(self, parts, error):
        reply = reply_to(*parts)
        assert not reply.is_answered
        assert error in reply.error

    def test_refusals(self):
        from serving_figures import is_refused

        body = json.dumps({"error": {"message": "busy"}}).encode()
        head = b"HTTP/1.1 429 X\r\nretry-after: 7\r\ncontent-length: %d\r\n\r\n" % len(body)
        reply = reply_to(head + body)
        assert (reply.status, reply.error, reply.retry_after, is_refused(reply)) == (429, "busy", "7", True)
        assert not is_refused(reply_to(head + body[:-3]))
        reply = reply_to(b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n")
        assert (reply.status, reply.error) == (500, "status 500 without a reason")

    def test_one_without_an_end_is_stuck(self, monkeypatch):
        import serving_client

        monkeypatch.setattr(serving_client, "LIMIT_S", 0.1)
        reply = reply_to(HEAD, chunk(EVENTS[1]), pause_s=0.2)
        assert reply.error.startswith("stuck")
        assert not reply.is_whole

    def test_requests_go_out_when_they_are_due(self):
        """Although no answer comes."""
        from inference_cases import Arrival
        from serving_client import Address, offer

        begun = []

        async def ask(address, request, reply, clock):
            begun.append(clock())
            await asyncio.sleep(0.3)

        arrivals = [Arrival(0.02 * i, 1, 1) for i in range(10)]
        replies = asyncio.run(offer(Address(1), arrivals, [b""] * 10, [ask] * 10))
        assert len(replies) == 10
        assert all(0 <= late < 0.1 for late in begun)


def answered(first_s, per_token_s, n_tokens=11, due_s=0.0):
    from serving_client import Reply

    last = first_s + per_token_s * (n_tokens - 1)
    return Reply(
        status=200, first_s=first_s, done_s=last, due_s=due_s, n_tokens=n_tokens, is_whole=True, times_s=[first_s, last]
    )  # fmt: skip


class TestFigures:
    def test_summary(self):
        from serving_client import Reply
        from serving_figures import is_sustained, summary

        replies = [answered(0.1 * i, 0.01, due_s=1.0) for i in range(1, 102)]
        found = summary(replies)
        assert (found["requests"], found["answered"], found["refused"], found["failed"]) == (101, 101, 0, 0)
        assert found["seconds"] == pytest.approx(1 + 10.1 + 0.1)
        assert found["tokens_per_s"] == pytest.approx(101 * 11 / 11.2)
        assert found["first_token_s"] == pytest.approx({"p50": 5.1, "p95": 9.6, "p99": 10.0})
        assert found["per_token_s"] == pytest.approx({"p50": 0.01, "p95": 0.01, "p99": 0.01})
        assert is_sustained([found], 9.7)
        assert not is_sustained([found, found], 9.5)
        refused = Reply(status=429, is_whole=True, error="busy", done_s=0.1)
        lost = Reply(status=500, error="the stream broke off", done_s=0.1)
        found = summary([*replies, refused, lost])
        assert (found["answered"], found["refused"], found["failed"], found["http_5xx"]) == (101, 1, 1, 1)
        assert not is_sustained([found], 100.0)
        assert summary([refused])["first_token_s"] is None
        textless = Reply(status=200, is_whole=True, n_tokens=5, done_s=0.1)  # special tokens only
        found = summary([*replies, textless])
        assert found["answered"] == 102
        assert found["first_token_s"] == pytest.approx({"p50": 5.1, "p95": 9.6, "p99": 10.0})

    def test_metrics(self):
        from serving_figures import metrics, summary

        def runs(*seconds, status=200):
            found = [summary([answered(0.1, (s - 0.1) / 10)]) for s in seconds]
            return [run | {"http_5xx": int(status >= 500)} for run in found]

        details = {
            "loads": {
                "0.5": {"server": runs(1, 2, 4, status=503), "transformers": runs(8, 8, 8, status=500)}
            },
            "sustained_rate": {"server": 0.5},
            "flood": {"server": runs(2.2, 5, 4), "engine": runs(2, 4, 4), "transformers": runs(11, 11, 11)},
        }
        found = metrics(details)
        assert all(isinstance(value, int | float) for value in found.values())
        assert found["http_5xx"] == 3
        assert found["server_rate_0.5_tokens_per_s"] == pytest.approx(11 / 2)
        assert found["server_sustained_rate"] == 0.5
        assert found["overhead_over_engine"] == pytest.approx(0.1)
        assert found["flood_tokens_per_s_over_transformers"] == pytest.approx(11 / 4)


class TestSoak:
    def test_what_must_not_be(self):
        from serving_client import Reply
        from serving_soak import _details, _failures

        def failures(kind, reply, samples=(100,) * 20, minutes=20.0):
            details = _details([kind], [reply], samples)
            return _failures(details | {"minutes": minutes, "left_open": {"open": 0.0, "bytes": 3.0}})

        rest = ["bytes is 3 at the end"]
        assert failures("well", answered(0.1, 0.1)) == rest
        assert failures("well", Reply(status=429, is_whole=True, error="busy")) == rest
        assert failures("well", Reply(status=429, is_whole=True)) == ["1 unexplained", *rest]
        assert failures("well", Reply(error="stuck: no end")) == ["1 stuck", "1 unexplained", *rest]
        assert failures("leaves", Reply()) == rest
        assert failures("oversize", Reply(status=413, is_whole=True, error="large")) == rest
        assert failures("malformed", Reply(status=200)) == ["1 accepted_by_mistake", *rest]
        assert failures("malformed", Reply(status=500)) == ["1 http_5xx", *rest]
        grown = (50, 50, 100, 100, *(90,) * 14, 106, 106)
        assert failures("leaves", Reply(), grown) == [*rest, "memory grew by 6.0%"]
        assert failures("leaves", Reply(), grown, minutes=1.0) == rest


def test_quick_runs_all_systems_and_the_soak(monkeypatch, capsys, tmp_path):
    import serving

    out = tmp_path / "serving.json"
    command = "serving.py --quick --rate 20 --seconds 1 --flood 4 --threads 1 --soak 0.05 --soak-rate 10"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--work", str(tmp_path), "--out", str(out)])
    serving.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(out.read_text())
    found, details = report["metrics"], report["details"]
    for name in ("server", "engine", "transformers", "transformers_batched"):
        (run,) = details["loads"]["20"][name]
        assert (run["requests"], run["answered"], run["failed"]) == (20, 20, 0)
        # The same requests, to the last token: what they write is not what they would like to write.
        assert run["tokens_per_s"] * run["seconds"] == pytest.approx(
            details["loads"]["20"]["engine"][0]["tokens_per_s"]
            * details["loads"]["20"]["engine"][0]["seconds"]
        )
        assert found[f"{name}_sustained_rate"] == 20
        assert found[f"{name}_flood_tokens_per_s"] > 0
    assert (found["http_5xx"], found["soak_http_5xx"], found["soak_unexplained"]) == (0, 0, 0)
    assert "overhead_over_engine" in found
    assert details["soak"]["requests"] == 30
    assert not any(details["soak"]["left_open"].values())
