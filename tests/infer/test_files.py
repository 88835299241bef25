import json
import os
import threading

import pytest

import twofold
from twofold.infer import Request, RequestFailed, Sampling
from twofold.infer.files import BadLine, Line, answer_lines, read_lines

CHAT = [{"role": "user", "content": "hi"}]


def parsed(*raw):
    return list(read_lines(raw))


class TestReadLines:
    def test_every_line_gives_one(self):
        lines = parsed(
            b'\xef\xbb\xbf{"text": "one"}\n',
            b"\n",
            b'{"messages": [{"role": "user", "content": "hi"}], "id": [1]}\n',
        )
        assert [(line.number, line.prompt, line.id) for line in lines] == [
            (1, "one", None),
            (2, None, None),
            (3, CHAT, [1]),
        ]
        assert [line.n_bytes for line in lines] == [19, 1, 61]
        assert lines[1].error.startswith("the line is empty")

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (b"{", "not JSON in UTF-8"),
            (b'{"text": "\xff"}', "not JSON in UTF-8"),
            (b'{"text": "\\ud800"}', "not JSON in UTF-8"),
            (b"[" * 100_000, "not JSON in UTF-8"),
            (b"[1]", "got list"),
            (b'{"txt": 1}', "exactly one of them; got txt"),
            (b'{"text": "a", "messages": []}', "exactly one of them; got text, messages"),
            (b'{"text": ["a"]}', "must be a string, got list"),
            (b'{"text": ""}', '"text" is empty'),
            (b'{"messages": []}', '"messages" must be a list of'),
            (b'{"messages": [{"role": "user"}]}', '"messages" must be a list of'),
        ],
    )
    def test_what_cannot_be_used_says_why(self, raw, message):
        good, bad, after = parsed(b'{"text": "a"}', raw, b'{"text": "b"}')
        assert message in bad.error
        assert bad.prompt is None
        assert (good.prompt, after.prompt, after.number) == ("a", "b", 3)

    def test_a_bad_line_keeps_its_id(self):
        assert parsed(b'{"id": "x", "text": 3}')[0].id == "x"


def lines_of(*prompts):
    return [Line(number=number, prompt=prompt) for number, prompt in enumerate(prompts, start=1)]


def engine_of(model, **options):
    return twofold.Engine(model, device="cpu", **options)


PROMPTS = ["hello", "a", CHAT, "of middle length", "b", "a rather long text, longer than others", "cd"]
SAMPLED = Request(prompt="", max_new_tokens=6, sampling=Sampling(temperature=1.5, seed=40))


class TestAnswerLines:
    @pytest.mark.parametrize(("batch_size", "window"), [(1, 1), (2, 3), (8, 256)])
    def test_each_line_gets_what_it_gets_alone(self, text_model, batch_size, window):
        model = text_model()
        found = list(
            answer_lines(engine_of(model, batch_size=batch_size), lines_of(*PROMPTS), SAMPLED, window=window)
        )
        assert [answer.line.number for answer in found] == list(range(1, 8))
        for index, (prompt, answer) in enumerate(zip(PROMPTS, found, strict=True)):
            alone = engine_of(model).generate([prompt], max_new_tokens=6, temperature=1.5, seed=40 + index)[0]
            assert answer.completions == (alone,)
            assert answer.n_tokens == len(alone.token_ids)
            assert answer.to_json() == {"line": index + 1, **alone.to_json()}

    def test_no_two_samples_of_a_file_share_a_stream(self, text_model):
        """The same text in every line: line i draws with seed + i * n and up."""
        engine = engine_of(text_model())
        template = Request(prompt="", max_new_tokens=5, n=2, sampling=Sampling(temperature=2.0, seed=3))
        found = [a.completions for a in answer_lines(engine, lines_of("same", "same"), template)]
        expected = [
            engine.generate(["same"], max_new_tokens=5, temperature=2.0, seed=3 + i)[0] for i in range(4)
        ]
        assert [*found[0], *found[1]] == expected
        assert len({c.token_ids for c in expected}) == 4

    def test_several_answers_are_a_list(self, text_model):
        template = Request(prompt="", max_new_tokens=3, num_beams=3, n=2)
        line = Line(number=4, prompt="hello", id={"a": 1})
        (answer,) = answer_lines(engine_of(text_model()), [line], template)
        assert answer.to_json() == {
            "line": 4,
            "id": {"a": 1},
            "answers": [completion.to_json() for completion in answer.completions],
        }

    def test_bad_lines_are_answered_with_their_errors(self, text_model):
        bad = Line(number=2, id="x", error="no good")
        lines = [*lines_of("hello"), bad, Line(number=3, prompt="long " * 100), Line(number=4, prompt="last")]
        found = list(answer_lines(engine_of(text_model()), lines, SAMPLED))
        assert found[1].to_json() == {"line": 2, "id": "x", "error": "no good"}
        assert "max_position_embeddings of 256" in found[2].error
        assert [answer.error is None for answer in found] == [True, False, False, True]

    def test_strict_ends_after_the_answers_before(self, text_model):
        engine = engine_of(text_model())
        lines = [*lines_of("hello", "you"), Line(number=3, error="no good"), Line(number=4, prompt="last")]
        answers = answer_lines(engine, lines, SAMPLED, strict=True)
        found = [next(answers), next(answers)]
        with pytest.raises(BadLine, match="line 3: no good"):
            next(answers)
        assert [answer.line.number for answer in found] == [1, 2]
        assert engine.loop.is_idle

    def test_a_chat_template_that_refuses_concerns_its_line(self, text_model, byte_tokenizer, monkeypatch):
        monkeypatch.setattr(byte_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
        found = list(answer_lines(engine_of(text_model()), lines_of(CHAT, "hello"), SAMPLED))
        assert "roles must alternate" in found[0].error
        assert found[1].error is None

    def test_a_constraint_that_allows_nothing_concerns_its_line_and_a_failure_everybody(self, text_model):
        class Constraint:
            def __init__(self, error):
                self.error = error

            def apply(self, logits_V):
                raise self.error

            def fork(self):
                return self

        engine = engine_of(text_model())
        refused = Request(prompt="", constraint=Constraint(ValueError("nothing is allowed")))
        (answer,) = answer_lines(engine, lines_of("hello"), refused)
        assert answer.error == "nothing is allowed"
        broken = Request(prompt="", constraint=Constraint(MemoryError("no memory")))
        with pytest.raises(RequestFailed, match="no memory"):
            list(answer_lines(engine, lines_of("hello", "you"), broken))
        assert engine.loop.is_idle

    def test_no_more_lines_are_handed_in_than_the_window(self, text_model):
        engine = engine_of(text_model(), batch_size=2)
        submit, n_open = engine.submit, [0]
        handles = []

        def counted(request):
            handles.append(submit(request))
            n_open[0] = max(n_open[0], sum(not handle.is_done for handle in handles))
            return handles[-1]

        engine.submit = counted
        endless = (Line(number=number, prompt="hello") for number in range(1, 1 << 60))
        answers = answer_lines(engine, endless, SAMPLED, window=5)
        for _ in range(20):
            next(answers)
        assert n_open == [5]
        assert len(handles) <= 25
        answers.close()
        assert engine.loop.is_idle

    def test_a_pipe_gets_answers_before_it_gives_more(self, text_model):
        """Whoever writes a line may wait for its answer before writing the next."""
        read, write = os.pipe()
        with os.fdopen(read, "rb") as source, os.fdopen(write, "wb") as sink:

            def say(text):
                sink.write(json.dumps({"text": text}).encode() + b"\n")
                sink.flush()

            say("hello")
            answers = answer_lines(engine_of(text_model()), read_lines(source), SAMPLED)
            assert next(answers).line.number == 1
            say("you")
            assert next(answers).line.number == 2
            sink.close()
            assert list(answers) == []

    def test_an_error_of_the_source_arrives(self, text_model):
        def lines():
            yield from lines_of("hello")
            raise OSError("the disk is gone")

        answers = answer_lines(engine_of(text_model()), lines(), SAMPLED)
        with pytest.raises(OSError, match="the disk is gone"):
            list(answers)

    def test_leaving_early_ends_the_reader(self, text_model):
        before = threading.active_count()
        answers = answer_lines(engine_of(text_model()), lines_of(*["hello"] * 50), SAMPLED, window=2)
        next(answers)
        answers.close()
        for thread in threading.enumerate():
            if thread.name == "twofold-lines":
                thread.join(10)
        assert threading.active_count() <= before
