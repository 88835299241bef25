"""On-policy distillation: what the teacher reads, the loss against one example at a time, and whole runs."""

import json

import numpy as np
import pytest
import torch

import twofold
from tests.models.tiny import assert_same
from tests.posttrain.tiny_pairs import written
from tests.train.conftest import one_thread  # noqa: F401
from tests.train.ranks import on_ranks
from tests.train.test_loop import StopAfter
from tests.train.tiny_run import BOS, EOS, byte_tokenizer, tiny_model
from tests.train.tiny_teacher import next_token_distributions, save_donor, student
from twofold.checkpoint.save import save
from twofold.config.gkd import OnPolicyConfig, OnPolicyRecipe
from twofold.data import Convention, Corpus, Loader
from twofold.data.teaching import RawRows
from twofold.posttrain.gkd import Answering, OnPolicyLoader, OnPolicyObjective
from twofold.posttrain.gkd_runs import train_on_policy
from twofold.posttrain.rollouts import Answer, RolloutEngine
from twofold.posttrain.stages import read_run
from twofold.train.step import batch_loss
from twofold.train.teacher import EncoderDecoderTeacher, open_decoder_teacher
from twofold.train.world import ONE_PROCESS

RECORDS = [{"prompt": f"{a}+{a + 1}=", "completion": str(2 * a + 1)} for a in range(14)]
CPU = torch.device("cpu")
LOSSLESS = {
    "layout": "merged", "reads": "aligned", "cross_rope": True, "decoder_positions": "continue",
    "decoder_start": "last_source_token",
}  # fmt: skip


def recipe(folder, **changes):
    """A tiny student and a donor as its teacher; output is `folder / "run"`."""
    if not (folder / "donor").exists():
        save_donor(folder / "donor")
        save(tiny_model(dropout=0.1), folder / "start")
        written(folder / "pairs.jsonl", RECORDS)
    data = {
        "sources": [
            {"path": str(folder / "pairs.jsonl"), "prompt_field": "prompt", "completion_field": "completion"}
        ],
        "held_out_fraction": 0.3,
        "objective": {"name": "supervised"},
        "source_length": 20,
        "target_length": 12,
        "rows_per_batch": 2,
    }
    values = {
        "stage": "gkd",
        "model": {"path": str(folder / "start")},
        "data": data | changes.pop("data", {}),
        "gkd": {"teacher": str(folder / "donor")} | changes.pop("gkd", {}),
        "rollout": {"max_new_tokens": 5},
        "output": str(folder / "run"),
        "steps": 4,
        "accumulate_batches": 2,
        "optimizer": {"learning_rate": 3e-3},
        "evaluate_every": 2,
        "tensorboard": False,
        "device": "cpu",
    }
    return OnPolicyRecipe(**(values | changes))


def loader(model, folder, **changes):
    convention = Convention.of(model.config)
    corpus = Corpus.from_records(RECORDS, model.tokenizer, convention)
    return Loader([corpus], model.tokenizer, recipe(folder, **changes).data, convention)


def answering(model, teaching=None):
    return Answering(convention=Convention.of(model.config), teaching=teaching, pad_multiple=4)


def answers(batch, text="é?"):
    """One to each example, with a stop token, but the first."""
    ids = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return [Answer((*ids, *([EOS] if n else [])), text, not n) for n, _ in enumerate(batch.texts())]


@pytest.mark.parametrize(
    "meeting", [{}, LOSSLESS, {"source_bos": True}], ids=["bos", "lossless", "source-bos"]
)
def test_the_teacher_reads_prompt_and_answer_as_one_text(meeting, tmp_path):
    model = tiny_model(**meeting)
    asked = next(loader(model, tmp_path).one_pass())
    made = answering(model, RawRows(BOS, 4)).batch(asked, answers(asked))
    assert made.is_on_policy
    texts = iter(zip(asked.texts(), answers(asked), strict=True))
    prompts = {record["prompt"] for record in RECORDS}
    for n in range(2):
        for segment in range(1, int(made.decoder_segment_ids[n].max()) + 1):
            _, answer = next(texts)
            read = made.teacher_input_ids[n][made.teacher_segment_ids[n] == segment].tolist()
            n_before = len(read) - len(answer.token_ids)
            assert read[0] == BOS
            assert model.tokenizer.decode(read[1:n_before]) in prompts
            assert read[n_before:] == list(answer.token_ids)
            own = (made.decoder_segment_ids[n] == segment) & (made.labels[n] >= 0)
            assert made.labels[n][own].tolist() == list(answer.token_ids)
            # Each token, the stop token included, is predicted at the state of the one before it.
            at = made.teacher_index[n][own]
            assert made.teacher_input_ids[n][at + 1].tolist() == list(answer.token_ids)
            assert set(made.teacher_segment_ids[n][at].tolist()) == {segment}
    assert next(texts, None) is None
    stored = answering(model).batch(asked)
    assert not stored.is_on_policy
    assert [t.target for t in stored.texts()] == [t.target for t in asked.texts()]


def kl(a, b):
    return (a * (a.log() - b.log())).sum(-1)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_loss_is_that_of_one_example_at_a_time(kind, tmp_path):
    """Packed rows, answers of the student's, a language model as teacher, against transformers' and plain autograd."""
    donor = save_donor(tmp_path / "donor", seed=3)
    model = student()
    asked = next(loader(model, tmp_path).one_pass())
    given = answers(asked)
    teacher = open_decoder_teacher(
        tmp_path / "donor", dtype=torch.float32, device=CPU, max_length=60, vocab_size=259
    )
    batch = answering(model, RawRows(teacher.bos_token_id, 4)).batch(asked, given)
    config = OnPolicyConfig(teacher="unused", divergence=kind)
    loss = batch_loss(OnPolicyObjective(model, teacher=teacher, config=config), batch, CPU)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    total = torch.zeros(())
    for text, answer in zip(asked.texts(), given, strict=True):
        target = list(answer.token_ids)
        source = torch.tensor([text.source])
        decoder = torch.tensor([[*text.prefix, *target[:-1]]])
        q = model(source, decoder_input_ids=decoder).logits[0].softmax(-1)
        p = next_token_distributions(donor, [*text.source, *target])[len(text.source) - 1 : -1]
        m = (p + q) / 2
        value = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[kind]
        total = total + value.sum()
    total.backward()
    assert_same(loss / total, torch.ones(()))
    for name, p in model.named_parameters():
        assert_same(found[name] / p.grad.abs().max(), p.grad / p.grad.abs().max())


def test_a_pair_that_is_its_donor_has_nothing_to_learn_from_it(tmp_path):
    """A lossless start with a causal encoder computes the donor: also where answers end."""
    save_donor(tmp_path / "donor", seed=3)
    model = twofold.adapt(tmp_path / "donor", start="lossless", encoder_mask="causal")
    teacher = open_decoder_teacher(
        tmp_path / "donor", dtype=torch.float32, device=CPU, max_length=60, vocab_size=259
    )
    asked = next(loader(model, tmp_path).one_pass())
    objective = OnPolicyObjective(model, teacher=teacher, config=OnPolicyConfig(teacher="unused"))
    for given in (None, answers(asked)):
        batch = answering(model, RawRows(teacher.bos_token_id, 4)).batch(asked, given)
        assert batch_loss(objective, batch, CPU).item() == pytest.approx(0.0, abs=1e-4)
    other = OnPolicyObjective(tiny_model(**LOSSLESS), teacher=teacher, config=objective.config)
    assert batch_loss(other, batch, CPU).item() > 1


def test_an_encoder_decoder_teaches_too(tmp_path):
    model = student()
    asked = next(loader(model, tmp_path).one_pass())
    batch = answering(model).batch(asked, answers(asked))
    config = OnPolicyConfig(teacher="unused", divergence="forward_kl")
    same = OnPolicyObjective(model, teacher=EncoderDecoderTeacher(student()), config=config)
    assert batch_loss(same, batch, CPU).item() == pytest.approx(0.0, abs=1e-4)


def test_answers_are_the_students_with_the_weights_of_the_step(tmp_path):
    """Nearly greedy, so that the engine's greedy answers are the expected ones."""
    run = recipe(tmp_path, gkd={"on_policy_share": 0.5}, rollout={"max_new_tokens": 5, "temperature": 1e-4})
    model = student()
    texts = loader(model, tmp_path, data={"rows_per_batch": 1})
    world = ONE_PROCESS
    found = OnPolicyLoader(texts, answering(model), RolloutEngine(model, run.rollout, world), run, world)
    kinds = []
    for step in range(6):
        if step == 3:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        (batch,) = found.next_step()
        kinds.append(batch.is_on_policy)
        completions = {r["prompt"]: r["completion"] for r in RECORDS}
        for text in batch.texts():
            prompt = model.tokenizer.decode(text.source)
            if batch.is_on_policy:
                engine = twofold.Engine(model, backend="torch")
                (expected,) = engine.generate([prompt], max_new_tokens=5)
                assert text.target == list(expected.token_ids)
            else:
                assert model.tokenizer.decode(text.target) == completions[prompt] + "<eos>"
    expected_kinds = [np.random.default_rng((0, step, 0)).random() < 0.5 for step in range(6)]
    assert kinds == expected_kinds
    assert set(kinds) == {True, False}


def lines_of(result):
    return [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", [None, {"rank": 2, "dropout": 0.1}], ids=["whole", "adapter"])
def test_a_resumed_run_equals_the_run_that_never_stopped(adapter, tmp_path):
    whole = train_on_policy(recipe(tmp_path, output=str(tmp_path / "whole"), adapter=adapter))
    parts = recipe(tmp_path, adapter=adapter)
    assert not train_on_policy(parts, callbacks=[StopAfter(3)]).is_finished
    resumed = train_on_policy(parts, resume=True)
    assert (whole.losses, whole.held_out, whole.tokens) == (resumed.losses, resumed.held_out, resumed.tokens)
    shares = [line["on_policy"] for line in lines_of(whole) if "on_policy" in line]
    assert len(shares) == 4
    assert len(set(shares)) > 1
    one, other = (dict(twofold.load(r.model_path).named_parameters()) for r in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_student_comes_nearer_to_its_teacher(tmp_path):
    changes = {"steps": 10, "optimizer": {"learning_rate": 1e-2}, "evaluate_every": None}
    for share in (0.0, 1.0):
        rollout = {"max_new_tokens": 5} if share else None
        run = recipe(
            tmp_path,
            gkd={"on_policy_share": share},
            rollout=rollout,
            output=str(tmp_path / f"{share}"),
            **changes,
        )
        result = train_on_policy(run)
        assert {line["on_policy"] for line in lines_of(result) if "on_policy" in line} == {share}
        assert result.held_out[-1][1] < 0.95 * result.held_out[0][1]


def losses_of(run):
    result = train_on_policy(run)
    return result.losses, result.held_out


def test_two_ranks_do_what_one_does(tmp_path):
    recipe(tmp_path)
    save(tiny_model(), tmp_path / "start", overwrite=True)
    runs = [recipe(tmp_path, steps=2, output=str(tmp_path / name)) for name in ("one", "two")]
    losses, held_out = losses_of(runs[0])
    for found, found_held_out in on_ranks(losses_of, 2, runs[1]):
        assert found == pytest.approx(losses, rel=3e-6)
        assert [x for _, x in found_held_out] == pytest.approx([x for _, x in held_out], rel=3e-6)


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"so the student writes answers: set rollout\.max_new_tokens"):
        recipe(tmp_path, rollout=None)
    with pytest.raises(ValueError, match=r"needs data\.objective\.name 'supervised'"):
        recipe(tmp_path, data={"objective": {"name": "prefix_lm"}, "sources": [{"path": "x"}]})
    with pytest.warns(UserWarning, match="rollout has no effect"):
        recipe(tmp_path, gkd={"on_policy_share": 0})
    with pytest.warns(UserWarning, match=r"beta=0\.1 has no effect"):
        recipe(tmp_path, gkd={"divergence": "forward_kl", "beta": 0.1})
    with pytest.raises(ValueError, match=r"data\.target_length is 132 tokens"):
        train_on_policy(recipe(tmp_path, rollout={"max_new_tokens": 120}))
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_one(monkeypatch):
    monkeypatch.setenv("TWOFOLD_DATA", "/data")
    run = read_run("recipes/smollm2-gkd.yaml")
    assert isinstance(run, OnPolicyRecipe)
    assert run.gkd.teacher == run.model.adapt.encoder
