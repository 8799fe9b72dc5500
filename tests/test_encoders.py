"""Encoders: shapes, what they refuse, and gradients that reach every weight."""

import pytest
import timm
import torch
from torch import nn

from siamese.encoders import MLP, Conv4, Flatten, Timm

TINY = "test_resnet"  # of timm: 0.4 million weights
ENCODERS = {
    "conv4": lambda: Conv4((1, 32, 32)),
    "conv4 of two blocks": lambda: Conv4((3, 20, 28), widths=(8, 16), embedding_size=10),
    "mlp": lambda: MLP((1, 32, 32)),
    "linear": lambda: MLP((1, 32, 32), hidden=(), embedding_size=5),
    "timm": lambda: Timm((1, 32, 32), TINY),
    "timm without a head": lambda: Timm((3, 32, 32), TINY, embedding_size=None),
    "timm of a hidden head": lambda: Timm((3, 32, 32), "mobilenetv3_small_050", embedding_size=None),
}
SHAPES = {"conv4 of two blocks": (3, 20, 28), "timm without a head": (3, 32, 32), "timm of a hidden head": (3, 32, 32)}


@pytest.fixture(params=ENCODERS)
def encoder(request) -> tuple[nn.Module, torch.Tensor]:
    """(encoder, a batch of seven inputs for it)."""
    torch.manual_seed(0)
    return ENCODERS[request.param](), torch.rand(7, *SHAPES.get(request.param, (1, 32, 32)))


def test_one_embedding_for_each_input(encoder):
    model, inputs = encoder
    embeddings = model(inputs)
    assert embeddings.shape == (7, model.embedding_size)
    assert embeddings.dtype == torch.float32
    assert embeddings.isfinite().all()


def test_an_embedding_depends_on_its_own_input_alone(encoder):
    model, inputs = encoder
    model.eval()
    with torch.no_grad():
        together, alone = model(inputs), torch.cat([model(one) for one in inputs.split(1)])
        turned = model(inputs.flip(0)).flip(0)
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, turned, atol=1e-4)
    assert torch.cdist(together, together)[0, 1:].min() > 1e-5, "different inputs, different embeddings"


def test_the_layout_in_memory_does_not_matter(encoder):
    model, inputs = encoder
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(inputs.contiguous(memory_format=torch.channels_last)), model(inputs), atol=1e-5)


def test_gradients_reach_every_weight(encoder):
    model, inputs = encoder
    with torch.no_grad():  # timm starts residual blocks at zero, through which no gradient goes
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    embeddings = model.train()(inputs)
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_an_encoder_starts_in_training_mode(encoder):
    assert all(module.training for module in encoder[0].modules())


@pytest.mark.parametrize(("size", "embedding_size"), [((1, 16, 16), 7), ((3, 16, 40), 64), ((2, 105, 105), 128)])
def test_conv4_takes_any_image_of_at_least_sixteen(size, embedding_size):
    model = Conv4(size, embedding_size=embedding_size)
    assert model.embedding_size == embedding_size
    assert model(torch.rand(2, *size)).shape == (2, embedding_size)


@pytest.mark.parametrize(("size", "widths", "least"), [((1, 15, 32), (8,) * 4, 16), ((1, 32, 15), (8,) * 4, 16), ((1, 7, 7), (8,) * 3, 8)])
def test_conv4_refuses_images_that_it_would_halve_to_nothing(size, widths, least):
    with pytest.raises(ValueError, match=f"at least {least} x {least}, these are {size[1]} x {size[2]}"):
        Conv4(size, widths=widths)


@pytest.mark.parametrize("shape", [(13,), (4, 6), (1, 8, 8)])
def test_an_mlp_takes_tables_and_images(shape):
    model = MLP(shape, hidden=(9, 8), embedding_size=3)
    assert model.embedding_size == 3
    assert model(torch.rand(5, *shape)).shape == (5, 3)
    assert [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)] == [9, 8, 3]


def test_timm_takes_the_channels_of_the_data():
    for channels in (1, 2, 3):
        assert Timm((channels, 32, 32), TINY, embedding_size=11)(torch.rand(2, channels, 32, 32)).shape == (2, 11)


def test_timm_refuses_other_channels_than_the_data_has():
    with pytest.raises(ValueError, match="in_chans=3, but the data has 1 channels"):
        Timm((1, 32, 32), TINY, in_chans=3)
    assert Timm((3, 32, 32), TINY, in_chans=3)(torch.rand(1, 3, 32, 32).repeat(2, 1, 1, 1)).shape == (2, 128)


def test_timm_without_a_head_gives_its_pooled_features():
    torch.manual_seed(0)
    model, inputs = Timm((3, 32, 32), TINY, embedding_size=None).eval(), torch.rand(2, 3, 32, 32)
    reference = timm.create_model(TINY, num_classes=0).eval()
    reference.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        assert torch.allclose(model(inputs), reference(inputs), atol=1e-5)


def test_an_unknown_model_is_refused_with_others_near():
    with pytest.raises(ValueError, match="timm has no model 'resnet_18'") as refusal:
        Timm((3, 32, 32), "resnet_18")
    near = str(refusal.value).partition("near are ")[2].split(", ")
    assert near
    assert all(timm.is_model(name) and "resnet" in name for name in near)


def test_an_unknown_model_like_no_other_is_refused():
    with pytest.raises(ValueError, match=r"timm has no model 'xyzzy'$"):
        Timm((3, 32, 32), "xyzzy")


def test_flatten_is_the_input_itself():
    inputs = torch.rand(5, 2, 3, 4)
    model = Flatten((2, 3, 4))
    assert model.embedding_size == 24
    assert torch.equal(model(inputs), inputs.reshape(5, 24))
    assert not list(model.parameters())
