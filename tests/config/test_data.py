import warnings

import pytest

from twofold.config.data import DataConfig, Denoiser, ObjectiveConfig, SourceConfig

TEXT = {"path": "a.txt"}
PAIRS = {"path": "a.jsonl", "prompt_field": "p", "completion_field": "c"}


def data(**changes):
    return DataConfig(
        **{"sources": [TEXT], "source_length": 8, "target_length": 8, "rows_per_batch": 2, **changes}
    )


def test_a_resolved_config_reads_back_without_a_word():
    config = data(
        objective={"name": "ul2", "denoisers": [[{"kind": "suffix", "noise_density": 0.5}, 2]]},
        held_out=[TEXT],
    )
    assert config.objective.denoisers[0][1] == 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DataConfig(**config.model_dump()) == config
        assert DataConfig.model_validate_json(config.model_dump_json()) == config


def test_unknown_key_is_refused():
    with pytest.raises(ValueError, match="wieght"):
        SourceConfig(path="a.txt", wieght=2)


@pytest.mark.parametrize("field", ["weight", "epochs", "max_documents", "max_tokens"])
def test_limits_of_a_source_are_above_zero(field):
    assert getattr(SourceConfig(path="a.txt", **{field: 2}), field) == 2
    with pytest.raises(ValueError, match=field):
        SourceConfig(path="a.txt", **{field: 0})


def test_all_sources_have_a_weight_or_none_has():
    data(sources=[{**TEXT, "weight": 1}, {**TEXT, "weight": 0.5}])
    with pytest.raises(ValueError, match=r"either all sources have a weight or none has, got \[1.0, None\]"):
        data(sources=[{**TEXT, "weight": 1}, TEXT])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"held_out": [{**TEXT, "weight": 1}]}, "weight=1.0 has no effect"),
        ({"held_out_ngram": 13}, "held_out_ngram=13 has no effect: nothing is held out"),
        (
            {"held_out": [TEXT], "held_out_ngram_share": 0.2},
            "held_out_ngram_share=0.2 has no effect: held_out_ngram is not set",
        ),
    ],
)
def test_settings_of_held_out_data_without_effect(fields, message):
    with pytest.warns(UserWarning, match=message):
        data(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_bad_share": 1.1},
        {"tokenize_workers": 0},
        {"pad_multiple": 0},
        {"held_out": [TEXT], "held_out_ngram": 0},
        {"held_out": [TEXT], "held_out_ngram": 3, "held_out_ngram_share": 0},
    ],
)
def test_ranges(fields):
    with pytest.raises(ValueError, match=list(fields)[-1]):
        data(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "path must name"),
        ({"path": "a", "prompt_field": "p"}, "go together"),
        ({**PAIRS, "messages_field": "m"}, "not both"),
        ({"path": "a", "format": "text", "messages_field": "m"}, "has no columns"),
        ({**PAIRS, "prompt_template": "{p}"}, "prompt_field .* two ways to say one thing"),
        ({"path": "a", "prompt_template": "{p}"}, "go together"),
        ({"path": "a", "prompt_template": "p", "completion_field": "c"}, "names no column"),
        ({"path": "a", "prompt_template": "{p", "completion_field": "c"}, "write {{ for a brace itself"),
        ({"path": "a", "prompt_template": "{p.x}", "completion_field": "c"}, "braces hold a column"),
        ({"path": "a", "prompt_template": "{p!r}", "completion_field": "c"}, "braces hold a column"),
        ({"path": "a", "completion_path": "b", "messages_field": "m"}, "not both"),
        ({"path": "a", "completion_path": "b", "format": "jsonl"}, "for text files, got format 'jsonl'"),
        (
            {"path": "a", "completion_path": "b", "prompt_template": "{en}"},
            "columns prompt and completion, got .*en",
        ),
    ],
)
def test_source_checks(fields, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**PAIRS, "text_field": "t"}, "text_field='t' has no effect"),
        ({"path": "a", "format": "jsonl", "document": "line"}, "document='line' has no effect"),
        ({"path": "a", "format": "jsonl", "split": "test"}, "split='test' has no effect"),
        (
            {"path": "a", "completion_path": "b", "document": "paragraph"},
            "document='paragraph' has no effect",
        ),
    ],
)
def test_source_warns_of_settings_without_effect(fields, message):
    with pytest.warns(UserWarning, match=message):
        SourceConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "span", "noise_density": 0.5}, "needs mean_span_length"),
        ({"kind": "span", "noise_density": 1.0, "mean_span_length": 3}, "between 0 and 1"),
        ({"kind": "span", "noise_density": 0.5, "mean_span_length": 0.5}, "at least 1 token"),
        ({"kind": "span", "noise_density": 0.5, "mean_span_length": 3, "split": "uniform"}, "for suffix"),
        ({"kind": "suffix", "noise_density": 0.5, "mean_span_length": 3}, "no mean_span_length"),
        ({"kind": "suffix", "noise_density": 0.25, "split": "uniform"}, r"set it to 0\.5"),
    ],
)
def test_denoiser_checks(fields, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "ul2"}, "either preset .* or denoisers"),
        (
            {"name": "ul2", "preset": "ul2", "denoisers": [({"kind": "suffix", "noise_density": 0.5}, 1)]},
            "either preset",
        ),
        ({"name": "ul2", "denoisers": [({"kind": "suffix", "noise_density": 0.5}, 0)]}, "above 0"),
        ({"name": "span_corruption", "noise_density": 0}, "between 0 and 1"),
    ],
)
def test_objective_checks(fields, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise_density": 0.5}, "noise_density=0.5 has no effect"),
        ({"name": "span_corruption", "split": "uniform"}, "split='uniform' has no effect"),
        ({"preset": "ul2"}, "preset='ul2' has no effect"),
    ],
)
def test_objective_warns_of_settings_without_effect(fields, message):
    with pytest.warns(UserWarning, match=message):
        ObjectiveConfig(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "at least one source"),
        ({"source_length": 0}, "source_length must be at least 1"),
        ({"target_length": 0}, "target_length must be at least 1"),
        ({"rows_per_batch": 0}, "rows_per_batch must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"held_out": [TEXT], "held_out_fraction": 0.1}, "not from both"),
        ({"objective": {"name": "supervised"}}, "needs pairs, but source 'a.txt'"),
        ({"sources": [PAIRS], "objective": {"name": "supervised"}, "held_out": [TEXT]}, "needs pairs"),
        ({"sources": [PAIRS]}, "needs running text, but source 'a.jsonl'"),
    ],
)
def test_data_checks(changes, message):
    with pytest.raises(ValueError, match=message):
        data(**changes)


def test_length_action_is_for_pairs():
    with pytest.warns(UserWarning, match="max_length_action='skip' has no effect"):
        data(max_length_action="skip")
    assert data(sources=[PAIRS], objective={"name": "supervised"}).max_length_action == "error"
