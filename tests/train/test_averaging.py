import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import twofold
from tests.models.families.test_t5gemma import reference
from tests.models.tiny import randomise
from tests.train.tiny_run import tiny_model
from twofold.checkpoint.save import save
from twofold.train.averaging import AverageWeights, average_checkpoints


def saved(folder, *seeds, **changes):
    for seed in seeds:
        save(tiny_model(seed, **changes), folder / f"m{seed}")
    return [folder / f"m{seed}" for seed in seeds]


def test_the_mean_of_checkpoints_is_that_of_their_tensors(tmp_path):
    folders = saved(tmp_path, 0, 1, 2)
    average_checkpoints(folders, tmp_path / "mean")
    mean = twofold.load(tmp_path / "mean")
    states = [twofold.load(folder).state_dict() for folder in folders]
    for name, tensor in mean.state_dict().items():
        wanted = torch.stack([state[name].double() for state in states]).mean(0).float()
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-8)
    assert mean.tokenizer.get_vocab() == twofold.load(folders[0]).tokenizer.get_vocab()


def test_weights_and_dtypes(tmp_path):
    folders = saved(tmp_path, 0, 1)
    half = tiny_model(3).to(torch.bfloat16)
    save(half, tmp_path / "half")
    average_checkpoints([tmp_path / "half", *folders], tmp_path / "mean", weights=[2, 1, 1])
    mean, tensors = (
        twofold.load(tmp_path / "mean").state_dict(),
        [twofold.load(f).state_dict() for f in folders],
    )
    for name, tensor in mean.items():
        assert tensor.dtype == torch.bfloat16  # the first one's, rounded once at the end
        wanted = (half.state_dict()[name].double() * 2 + tensors[0][name] + tensors[1][name]) / 4
        assert torch.equal(tensor, wanted.float().to(torch.bfloat16))


def test_one_checkpoint_is_its_own_mean(tmp_path):
    (folder,) = saved(tmp_path, 0)
    average_checkpoints([folder], tmp_path / "mean", weights=[0.3])
    a, b = load_file(folder / "model.safetensors"), load_file(tmp_path / "mean" / "model.safetensors")
    assert all(torch.allclose(a[name], b[name], rtol=1e-7, atol=0) for name in a)


def test_a_released_format_stays_what_it_is(tmp_path):
    folders = []
    for seed in (0, 1):
        model = reference("balanced")
        randomise(model, seed=seed)
        folders.append(tmp_path / str(seed))
        model.save_pretrained(folders[-1])
    average_checkpoints(folders, tmp_path / "mean")
    assert json.loads((tmp_path / "mean" / "config.json").read_text())["model_type"] == "t5gemma"
    states = [twofold.load(folder).state_dict() for folder in folders]
    for name, tensor in twofold.load(tmp_path / "mean").state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_refusals_leave_nothing(tmp_path):
    folders = saved(tmp_path, 0, 1)
    save(tiny_model(decoder_start="last_source_token"), tmp_path / "other")
    out = tmp_path / "mean"
    with pytest.raises(ValueError, match=r"different models: their configs differ in decoder_start"):
        average_checkpoints([*folders, tmp_path / "other"], out)
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="2 numbers above 0"):
            average_checkpoints(folders, out, weights=weights)
    with pytest.raises(ValueError, match="at least one"):
        average_checkpoints([], out)
    tensors = load_file(folders[1] / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:-1].clone()}, folders[1] / "model.safetensors")
    with pytest.raises(ValueError, match=r"has shape \[.*m0.*m1"):
        average_checkpoints(folders, out)
    save_file({n: t for n, t in tensors.items() if n != name}, folders[1] / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 are in one of them only, the first is {name}"):
        average_checkpoints(folders, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "other"]
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(FileExistsError):
        average_checkpoints(folders[:1], out)


def test_the_moving_average_is_its_formula():
    model = tiny_model()
    parameters = dict(model.named_parameters())
    average = AverageWeights(parameters, 0.9)
    wanted = {name: p.detach().double() for name, p in parameters.items()}
    for step in range(5):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        average.update()
        wanted = {name: 0.9 * old + 0.1 * parameters[name].detach().double() for name, old in wanted.items()}
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_swapping_goes_there_and_back_also_after_an_error():
    model = tiny_model()
    average = AverageWeights(dict(model.named_parameters()), 0.5)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.encoder.norm.weight.add_(1.0)
    after = copy.deepcopy(model.state_dict())
    with average.swapped():
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(KeyError), average.swapped():
        raise KeyError
    assert all(torch.equal(after[name], tensor) for name, tensor in model.state_dict().items())
    name = "model.encoder.norm.weight"
    assert torch.equal(average.tensors[name], before[name])
