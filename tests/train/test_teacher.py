"""Teachers against transformers reading each text alone, and a loss written out position by position."""

import pytest
import torch

from tests.models.tiny import pair_config, stack
from tests.train.ranks import on_ranks
from tests.train.tiny_run import BOS, EOS, TEXTS, VOCAB, data_config, recipe
from tests.train.tiny_teacher import next_token_distributions, save_donor, student
from twofold.adapt.depth import cut_decoder
from twofold.checkpoint.save import save
from twofold.config.distillation import DistillationConfig
from twofold.data import Convention, Corpus, Loader
from twofold.train import LossModule, train
from twofold.train.run import sentinel_ids
from twofold.train.step import scored_positions
from twofold.train.teacher import layer_pairs, open_distillation

OBJECTIVES = [
    {"name": "prefix_lm"},
    {"name": "prefix_lm", "split": "uniform"},
    {"name": "span_corruption", "noise_density": 0.4},
    {"name": "ul2", "preset": "t5gemma2"},
    {"name": "supervised"},
]
PAIRS = [{"prompt": f"question {n}?" * (n % 2 + 1), "completion": f"answer {n}"} for n in range(6)]


@pytest.fixture(scope="module", params=[False, True], ids=["no-bos", "bos"])
def donor(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("donor")
    return folder, save_donor(folder, adds_bos=request.param), request.param


def distil(model, folder, *, max_raw_length=64, **settings):
    return open_distillation(
        DistillationConfig(teacher=str(folder), **settings),
        model,
        pad_multiple=8,
        max_raw_length=max_raw_length,
        precision="float32",
        device=torch.device("cpu"),
    )


def loader(model, objective, *, teaching=None, **changes):
    convention = Convention.of(model.config)
    supervised = objective["name"] == "supervised"
    records = PAIRS if supervised else [{"text": text} for text in (*TEXTS[:5], "a short one", "tiny", "hi")]
    corpora = [Corpus.from_records(records, model.tokenizer, convention)]
    columns = {"prompt_field": "prompt", "completion_field": "completion"}
    source = {"path": "unused.jsonl", "format": "jsonl", **columns}
    lengths = {"sources": [source], "source_length": 48, "target_length": 32} if supervised else {}
    config = data_config(objective=objective, **(lengths | changes))
    sentinels = sentinel_ids(model, 20 if objective["name"] in ("ul2", "span_corruption") else 0)
    teaching = None if teaching is None else teaching(corpora)
    return Loader(corpora, model.tokenizer, config, convention, sentinels, teaching=teaching)


def examples_of(loader):
    """The examples of one pass, each with its raw text, as the loader makes them."""
    return [piece.example for piece in loader._in_order()]


def naive_loss(model, donor, adds_bos, examples, share=1.0):
    """One example at a time: its text through transformers, its loss one position at a time."""
    total, spoken = 0.0, 0
    for example in examples:
        raw = example.raw.tokens.tolist()
        text = [BOS, *raw] if adds_bos else raw
        said = next_token_distributions(donor, text)
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(example.source)[None],
                attention_mask=torch.ones(1, len(example.source), dtype=torch.bool),
                decoder_input_ids=torch.from_numpy(example.decoder_input_ids)[None],
                decoder_attention_mask=torch.ones(1, example.decoder_length, dtype=torch.bool),
            ).logits[0, len(example.decoder_prefix) - 1 :]
        for position, token in enumerate(example.target.tolist()):
            log_p = logits[position].double().log_softmax(dim=0)
            wanted = torch.zeros(len(log_p), dtype=torch.float64)
            before = int(example.raw.origins[position]) + adds_bos - 1
            is_text = int(example.raw.origins[position]) >= 0
            if is_text and before >= 0:
                assert text[before + 1] == token
                wanted[:VOCAB] = share * said[before].double()
                wanted[token] += 1 - share
                spoken += 1
            else:
                wanted[token] = 1.0
            total -= float((wanted * log_p).sum())
    return total, spoken


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("meeting", ["bos", "last_source_token"])
def test_the_loss_is_that_of_transformers_reading_each_text_alone(donor, objective, meeting):
    folder, reference, adds_bos = donor
    model = student(decoder_start=meeting)
    distillation = distil(model, folder)
    one = loader(model, objective, teaching=distillation.teaching, rows_per_batch=3)
    module = LossModule(model, teacher=distillation.teacher).train()
    batches = list(one.one_pass())
    assert max(int(batch.segment_ids.max()) for batch in batches) > 1  # packed
    with torch.no_grad():
        loss = sum(module(batch, scored_positions(batch)).item() for batch in batches)
    examples = examples_of(one)
    wanted, spoken = naive_loss(model, reference, adds_bos, examples)
    assert spoken > 0
    assert loss == pytest.approx(wanted, rel=1e-5)


def test_a_share_mixes_teacher_and_label(donor):
    folder, reference, adds_bos = donor
    model = student()
    distillation = distil(model, folder, share=0.3)
    one = loader(model, OBJECTIVES[0], teaching=distillation.teaching)
    module = LossModule(model, teacher=distillation.teacher, teacher_share=distillation.share).train()
    with torch.no_grad():
        loss = sum(module(batch, scored_positions(batch)).item() for batch in one.one_pass())
    wanted, _ = naive_loss(model, reference, adds_bos, examples_of(one), share=0.3)
    assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES[2:], ids=lambda o: o["name"])
def test_sentinels_and_stop_tokens_are_one_hot(donor, objective):
    folder, _, _ = donor
    model = student()
    distillation = distil(model, folder)
    one = loader(model, objective, teaching=distillation.teaching)
    seen = 0
    for batch in one.one_pass():
        labels, silent = batch.labels, batch.teacher_index < 0
        added = (labels >= VOCAB) | (labels == EOS)
        seen += int(added.sum())
        assert bool(silent[added].all())
        teacher = distillation.teacher(batch, scored := scored_positions(batch))
        assert torch.equal(teacher.speaks_N, ~silent.flatten()[scored])
    assert seen > 0


def test_packing_changes_nothing(donor):
    folder, _, _ = donor
    model = student()
    distillation = distil(model, folder)
    losses = []
    for packing in (True, False):
        one = loader(model, OBJECTIVES[2], teaching=distillation.teaching, packing=packing)
        module = LossModule(model, teacher=distillation.teacher).train()
        with torch.no_grad():
            losses.append(sum(module(batch, scored_positions(batch)).item() for batch in one.one_pass()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_cut_pair_is_read_as_it_was_cut(donor):
    folder, reference, adds_bos = donor
    model = student()
    distillation = distil(model, folder)
    one = loader(
        model,
        OBJECTIVES[4],
        teaching=distillation.teaching,
        source_length=9,
        target_length=5,
        max_length_action="truncate",
    )
    examples = examples_of(one)
    assert all(len(example.source) == 9 and not example.ends for example in examples)
    module = LossModule(model, teacher=distillation.teacher).train()
    with torch.no_grad():
        loss = sum(module(batch, scored_positions(batch)).item() for batch in one.one_pass())
    assert loss == pytest.approx(naive_loss(model, reference, adds_bos, examples)[0], rel=1e-5)


def test_a_teacher_is_no_part_of_the_student(donor):
    folder, _, _ = donor
    model = student()
    module = LossModule(model, teacher=distil(model, folder).teacher)
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert [name for name, _ in module.named_modules() if "teacher" in name] == []


def test_an_encoder_decoder_teacher_reads_the_same_batch(tmp_path):
    teacher, model = student(seed=1), student()
    save(teacher, tmp_path / "teacher")
    distillation = distil(model, tmp_path / "teacher")
    one = loader(model, OBJECTIVES[0], teaching=distillation.teaching)
    distillation.check(model)
    module = LossModule(model, teacher=distillation.teacher).train()
    for batch in one.one_pass():
        inputs = {
            name: getattr(batch, name)
            for name in ("input_ids", "segment_ids", "decoder_input_ids", "decoder_segment_ids")
        }
        with torch.no_grad():
            said, own = teacher(**inputs).logits.softmax(-1), model(**inputs).logits.log_softmax(-1)
            wanted = -(said * own).sum(-1)[batch.labels >= 0].sum().item()
            assert module(batch, scored_positions(batch)).item() == pytest.approx(wanted, rel=1e-5)


def distances(own, theirs):
    """1 - cosine of each position, float64, written out."""
    own, theirs = own.double(), theirs.double()
    lengths = own.square().sum(-1).sqrt() * theirs.square().sum(-1).sqrt()
    return 1 - (own * theirs).sum(-1) / lengths


@pytest.mark.parametrize("objective", [OBJECTIVES[1], OBJECTIVES[3], OBJECTIVES[4]], ids=lambda o: o["name"])
def test_hidden_states_are_drawn_to_those_of_transformers_reading_the_text(donor, objective):
    folder, reference, adds_bos = donor
    model = student(decoder_start="last_source_token")
    hidden = {"weight": 3.0, "layers": [[1, 0], [2, 2], [0, 1]]}
    distillation = distil(model, folder, hidden_states=hidden)
    one = loader(model, objective, teaching=distillation.teaching, rows_per_batch=3)
    module = LossModule(model, teacher=distillation.teacher, matching=distillation.matching).train()
    plain = LossModule(model, teacher=distillation.teacher).train()
    with torch.no_grad():
        added = sum(
            (module(batch, scored) - plain(batch, scored)).item()
            for batch in one.one_pass()
            for scored in [scored_positions(batch)]
        )
        wanted = 0.0
        for example in examples_of(one):
            raw = example.raw.tokens.tolist()
            text = torch.tensor([[BOS, *raw] if adds_bos else raw])
            said = reference(input_ids=text, output_hidden_states=True).hidden_states
            own = model(
                input_ids=torch.from_numpy(example.source)[None],
                attention_mask=torch.ones(1, len(example.source), dtype=torch.bool),
                decoder_input_ids=torch.from_numpy(example.decoder_input_ids)[None],
                decoder_attention_mask=torch.ones(1, example.decoder_length, dtype=torch.bool),
                output_hidden_states=True,
            ).decoder_hidden_states
            for position in range(len(example.target)):
                origin = int(example.raw.origins[position])
                before = origin + adds_bos - 1
                if origin < 0 or before < 0:
                    continue
                at = len(example.decoder_prefix) - 1 + position
                for layer, theirs in hidden["layers"]:
                    wanted += float(distances(own[layer][0, at], said[theirs][0, before]))
    assert wanted > 0
    assert added == pytest.approx(3.0 * wanted / 3, rel=1e-4)  # over three layers, three times


def test_hidden_states_of_an_encoder_decoder_teacher(tmp_path):
    teacher, model = student(seed=1), student()
    save(teacher, tmp_path / "teacher")
    distillation = distil(model, tmp_path / "teacher", hidden_states={"weight": 0.5})
    assert distillation.matching.layers == (1, 2)
    one = loader(model, OBJECTIVES[0])
    plain = LossModule(model, teacher=distillation.teacher).train()
    module = LossModule(model, teacher=distillation.teacher, matching=distillation.matching).train()
    # Dropout is off, so that train mode computes what eval mode does.
    for batch in one.one_pass():
        inputs = {
            name: getattr(batch, name)
            for name in ("input_ids", "segment_ids", "decoder_input_ids", "decoder_segment_ids")
        }
        scored = scored_positions(batch)
        with torch.no_grad():
            theirs, own = (
                m(**inputs, output_hidden_states=True).decoder_hidden_states for m in (teacher, model)
            )
            wanted = sum(distances(own[i], theirs[i])[batch.labels >= 0].sum().item() for i in (1, 2))
            added = (module(batch, scored) - plain(batch, scored)).item()
        assert added == pytest.approx(0.5 * wanted / 2, rel=1e-4)
    module(batch, scored).backward()
    norms = [layer.mlp.up_proj.weight.grad.norm() for layer in model.decoder.layers]
    model.zero_grad()
    plain(batch, scored).backward()
    assert all(
        (a - layer.mlp.up_proj.weight.grad.norm()).abs() > 1e-3 * a
        for a, layer in zip(norms, model.decoder.layers, strict=True)
    )
    assert not module.eval()(batch, scored).isnan()
    with torch.no_grad():
        assert module(batch, scored).item() == pytest.approx(plain.eval()(batch, scored).item(), rel=1e-6)


def test_layers_are_matched_where_they_came_from(tmp_path):
    model = student(layout="merged", reads="aligned", aligned_layers=(0, 1))
    assert layer_pairs(model.config, 2) == ((1, 1), (2, 2))
    short = cut_decoder(model, [1])
    assert layer_pairs(short.config, 2) == ((1, 2),)
    deep = pair_config(
        stack(num_hidden_layers=6, layer_types=("full_attention",) * 6),
        reads="aligned",
        aligned_layers=(0, 1, 2, 3, 4, 5),
    )
    cut = deep.model_copy(
        update={"decoder": deep.decoder.with_layers((1, 4, 5)), "aligned_layers": (1, 4, 5)}
    )
    assert layer_pairs(cut, 6) == ((1, 4), (2, 5), (3, 6))
    assert layer_pairs(cut, 12) == ((1, 4), (2, 8), (3, 12))  # of another depth: by their share of it
    final = pair_config(stack(num_hidden_layers=3))
    assert layer_pairs(final, 6) == ((1, 2), (2, 4), (3, 6))


def test_hidden_states_that_cannot_be_matched(tmp_path):
    save_donor(tmp_path / "donor", hidden_size=64)
    with pytest.raises(ValueError, match=r"student's decoder has 32 and the teacher 64"):
        distil(student(), tmp_path / "donor", hidden_states={})
    save_donor(tmp_path / "equal")
    with pytest.raises(ValueError, match=r"from 0 to 2 and a teacher's from 0 to 2 .* got \[\(3, 1\)\]"):
        distil(student(), tmp_path / "equal", hidden_states={"layers": [[1, 1], [3, 1]]})
    with pytest.raises(ValueError, match=r"got \[\]"):
        distil(student(), tmp_path / "equal", hidden_states={"layers": []})


def test_refused_teachers(tmp_path):
    save_donor(tmp_path / "donor")
    model = student()
    with pytest.raises(ValueError, match=r"kind is 'decoder', got kind='encoder_decoder'"):
        open_distillation(
            DistillationConfig(teacher=str(tmp_path / "donor"), kind="encoder_decoder"),
            model,
            pad_multiple=8,
            max_raw_length=8,
            precision="float32",
            device=torch.device("cpu"),
        )
    with pytest.raises(ValueError, match=r"reads 256 tokens.*texts of up to 257"):
        distil(model, tmp_path / "donor", max_raw_length=257)
    save(student(decoder_start="last_source_token"), tmp_path / "pair")
    with pytest.raises(ValueError, match=r"decoder_start is last_source_token and bos.*cannot read"):
        distil(model, tmp_path / "pair")
    save(student(), tmp_path / "small")
    distillation = distil(model, tmp_path / "small")
    sentinel_ids(model, 5)
    with pytest.raises(ValueError, match=r"has 264 entries .* the teacher's 259"):
        distillation.check(model)
    other = student()
    other.tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    save(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"different tokenizers: .* id 259"):
        distil(student(), tmp_path / "other")
    untold = student()
    untold.tokenizer = None
    with pytest.raises(ValueError, match=r"the student has none"):
        distil(untold, tmp_path / "donor")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither"),
        ({"teacher": "a", "targets": "b"}, "both"),
        ({"targets": "b", "kind": "decoder"}, "kind"),
        ({"targets": "b", "hidden_states": {}}, "teacher in the loop"),
        ({"teacher": "a", "hidden_states": {"weight": 0}}, "weight"),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**given)


def distilled(run):
    return train(run).losses


def test_ranks_share_a_teacher(tmp_path):
    save_donor(tmp_path / "donor")
    settings = {"teacher": str(tmp_path / "donor"), "hidden_states": {"weight": 2.0}}
    run = recipe(tmp_path, distillation=settings, steps=2)
    one = train(run.model_copy(update={"output": str(tmp_path / "one")})).losses
    for losses in on_ranks(distilled, 2, run):
        assert losses == pytest.approx(one, rel=1e-5)


def test_a_recipe_with_a_teacher_runs_and_resumes_to_the_same_losses(tmp_path):
    save_donor(tmp_path / "donor")
    constant = {"schedule": {"decay": "constant"}, "steps": 4}
    hidden_states = {"weight": 0.5}
    settings = {
        "distillation": {"teacher": str(tmp_path / "donor"), "hidden_states": hidden_states},
        **constant,
    }
    plain = train(recipe(tmp_path, output=str(tmp_path / "plain"), **constant))
    whole = train(recipe(tmp_path, output=str(tmp_path / "whole"), **settings))
    train(recipe(tmp_path, **(settings | {"steps": 2})))
    resumed = train(recipe(tmp_path, **settings), resume=True)
    assert resumed.losses != plain.losses
    assert resumed.losses == whole.losses
    # Held-out losses are without teacher: the same before the first step.
    assert resumed.held_out[0] == plain.held_out[0]
