"""Encoders: shapes, what they refuse, and gradients that reach every weight."""

import pytest
import timm
import torch
from torch import nn

from siamese.encoders import MLP, Conv4, Flatten, GeM, Koch, Residual, Timm, part_of

TINY, NHWC, TOKENS = "test_resnet", "test_mambaout", "test_vit"  # of timm: half a million weights each
ENCODERS = {
    "conv4": lambda: Conv4((1, 32, 32)),
    "conv4 of two blocks": lambda: Conv4((3, 20, 28), widths=(8, 16), embedding_size=10),
    "residual": lambda: Residual((1, 32, 32), widths=(8, 16, 16)),
    "residual of odd sides": lambda: Residual((3, 21, 33), widths=(8, 12), pool=1, embedding_size=5),
    "koch": lambda: Koch((1, 65, 70), embedding_size=6),
    "koch of two channels": lambda: Koch((2, 70, 65), embedding_size=6),
    "mlp": lambda: MLP((1, 32, 32)),
    "linear": lambda: MLP((1, 32, 32), hidden=(), embedding_size=5),
    "timm": lambda: Timm((1, 32, 32), TINY),
    "timm without a head": lambda: Timm((3, 32, 32), TINY, embedding_size=None),
    "timm of a hidden head": lambda: Timm((3, 32, 32), "mobilenetv3_small_050", embedding_size=None),
    "timm pooled by the average": lambda: Timm((1, 64, 64), TINY, pool="avg"),
    "timm pooled by the maximum": lambda: Timm((1, 64, 64), TINY, pool="max", embedding_size=None),
    "timm pooled by gem": lambda: Timm((1, 64, 64), TINY, pool="gem", hidden=(12, 11), embedding_size=10, normalize=True),
    "timm with its channels last": lambda: Timm((1, 64, 64), NHWC, pool="gem"),
}
SHAPES = {
    "conv4 of two blocks": (3, 20, 28),
    "residual of odd sides": (3, 21, 33),
    "koch": (1, 65, 70),
    "koch of two channels": (2, 70, 65),
    "timm without a head": (3, 32, 32),
    "timm of a hidden head": (3, 32, 32),
    "timm pooled by the average": (1, 64, 64),
    "timm pooled by the maximum": (1, 64, 64),
    "timm pooled by gem": (1, 64, 64),
    "timm with its channels last": (1, 64, 64),
}


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


def test_a_block_of_conv4_is_that_of_the_paper():
    """Convolution, batch-norm, ReLU, then pooling: to the last bit, in embeddings and gradients, whatever order is quicker."""
    torch.manual_seed(0)
    model, images = Conv4((1, 32, 32)), torch.randn(8, 1, 32, 32)
    ordered = nn.Sequential()
    for layer in model.layers:
        ordered.extend([nn.ReLU(), nn.MaxPool2d(2)] if isinstance(layer, nn.MaxPool2d) else [] if isinstance(layer, nn.ReLU) else [layer])
    found = []
    for embed in (model, lambda inputs: ordered(inputs.to(memory_format=torch.channels_last))):
        model.zero_grad()
        embeddings = embed(images)
        embeddings.square().sum().backward()
        found.append([embeddings.detach(), *(weight.grad.clone() for weight in model.parameters())])
    for ours, paper in zip(*found, strict=True):
        assert torch.equal(ours, paper)


@pytest.mark.parametrize(("options", "size"), [({}, 2 * 2 * 128), ({"widths": (8, 16), "pool": 3}, 9 * 16), ({"embedding_size": 7}, 7)])
def test_residual_keeps_the_cells_of_its_last_map_or_has_a_head(options, size):
    model = Residual((1, 32, 32), **options)
    assert model.embedding_size == size
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, size)


def test_a_stage_of_residual_adds_its_way_to_its_shortcut():
    """Without its way a stage is its shortcut: an average of 2 x 2 pixels, then a combination of channels."""
    torch.manual_seed(0)
    stage = Residual((1, 32, 32), widths=(8, 16)).layers[3].eval()
    nn.init.zeros_(stage.way[-1][0].weight)
    maps = torch.rand(2, 8, 16, 16)
    pooled = maps.view(2, 8, 8, 2, 8, 2).mean((3, 5))
    expected = torch.einsum("oc,bcyx->boyx", stage.shortcut[1][0].weight[:, :, 0, 0], pooled).clamp(min=0)
    assert torch.allclose(stage(maps), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "widths", "pool", "least"), [((1, 15, 32), (8, 8, 8), 2, 16), ((1, 32, 11), (8, 8), 3, 12)])
def test_residual_refuses_images_that_it_would_halve_to_nothing(shape, widths, pool, least):
    with pytest.raises(ValueError, match=f"at least {least} x {least}, these are {shape[1]} x {shape[2]}"):
        Residual(shape, widths, pool)


@pytest.mark.parametrize("options", [{"widths": ()}, {"pool": 0}, {"embedding_size": 0}])
def test_residual_refuses_values_that_leave_nothing(options):
    with pytest.raises(ValueError, match="numbers above 0"):
        Residual((1, 32, 32), **options)


def test_koch_has_the_layers_of_the_paper():
    with torch.device("meta"):  # 39 million weights, which need not be
        model = Koch((1, 105, 105))
    convolutions = [(m.in_channels, m.out_channels, m.kernel_size) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [(1, 64, (10, 10)), (64, 128, (7, 7)), (128, 128, (4, 4)), (128, 256, (4, 4))]
    kinds = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Linear)
    order = [type(m).__name__ for m in model.modules() if isinstance(m, kinds)]
    assert order == [*["Conv2d", "ReLU", "MaxPool2d"] * 3, "Conv2d", "ReLU", "Linear"]
    (last,) = (m for m in model.modules() if isinstance(m, nn.Linear))
    assert (last.in_features, last.out_features, model.embedding_size) == (9216, 4096, 4096)


def test_kochs_embeddings_come_out_of_a_sigmoid_in_single_precision():
    torch.manual_seed(0)
    model, inputs = Koch((1, 65, 65), embedding_size=50), torch.randn(3, 1, 65, 65)
    (last,) = (m for m in model.modules() if isinstance(m, nn.Linear))
    nn.init.constant_(last.bias, 3.0)
    before = []
    last.register_forward_hook(lambda module, args, output: before.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(inputs)
    assert before[0].dtype == torch.bfloat16
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings, 1 / (1 + (-before[0].float()).exp()), atol=1e-6)


@pytest.mark.parametrize("size", [(64, 105), (105, 64), (32, 32), (3, 3)])
def test_koch_refuses_images_that_are_too_small_for_its_convolutions(size):
    with pytest.raises(ValueError, match=f"at least 65 x 65, these are {size[0]} x {size[1]}: say dataset.size=105"):
        Koch((1, *size))


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


def maps_and_pooled(pool: str, name: str = TINY) -> tuple[torch.Tensor, torch.Tensor]:
    """The feature map that timm itself gives, channels first, and what the encoder makes of it."""
    torch.manual_seed(0)
    model, inputs = Timm((3, 64, 64), name, pool=pool, embedding_size=None).eval(), torch.rand(2, 3, 64, 64)
    reference = timm.create_model(name, num_classes=0, global_pool="").eval()
    reference.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        maps = reference(inputs)
        return maps.permute(0, 3, 1, 2) if name == NHWC else maps, model(inputs)


@pytest.mark.parametrize("name", [TINY, NHWC])
@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("avg", lambda maps: maps.mean((2, 3))),
        ("max", lambda maps: maps.amax((2, 3))),
        ("gem", lambda maps: (maps.clamp(min=1e-6) ** 3).mean((2, 3)) ** (1 / 3)),
    ],
)
def test_timm_pools_each_channel_of_its_feature_map(pool, expected, name):
    maps, pooled = maps_and_pooled(pool, name)
    assert maps.shape[2:] == (2, 2), "the test needs something to pool"
    assert torch.allclose(pooled, expected(maps), atol=1e-4)


def test_the_generalised_mean_lies_between_the_average_and_the_maximum():
    maps = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.allclose(GeM(1.0)(maps), maps.mean((2, 3)))
    assert torch.allclose(GeM(100.0)(maps), maps.amax((2, 3)), rtol=0.03)
    assert ((GeM()(maps) > maps.mean((2, 3))) & (GeM()(maps) < maps.amax((2, 3)))).all()
    assert GeM()(torch.full((1, 1, 2, 2), -5.0)).item() == pytest.approx(1e-6, rel=1e-3)
    assert [name for name, _ in GeM().named_parameters()] == ["p"]


def test_an_unknown_pool_is_refused():
    with pytest.raises(ValueError, match=r"pool=median is not known: take one of null, avg, max, gem"):
        Timm((3, 32, 32), TINY, pool="median")


def test_a_model_without_a_feature_map_is_left_to_timm():
    with pytest.raises(ValueError, match=r"pool=gem needs a feature map, test_vit ends in \[\d+, 64\] .*: say pool=null"):
        Timm((3, 160, 160), TOKENS, pool="gem")
    assert Timm((3, 160, 160), TOKENS)(torch.rand(1, 3, 160, 160)).shape == (1, 128)


def test_the_head_of_timm_has_the_widths_that_are_asked_for():
    model = Timm((3, 32, 32), TINY, hidden=(21, 13), embedding_size=8)
    assert [layer.out_features for layer in model.head.modules() if isinstance(layer, nn.Linear)] == [21, 13, 8]
    assert [type(layer).__name__ for layer in model.head] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    with pytest.raises(ValueError, match=r"hidden=\[21\] makes a head, which needs an embedding_size"):
        Timm((3, 32, 32), TINY, hidden=(21,), embedding_size=None)


@pytest.mark.parametrize("embedding_size", [8, None])
def test_timm_gives_embeddings_of_length_one_if_asked(embedding_size):
    torch.manual_seed(0)
    inputs = torch.rand(4, 3, 32, 32)
    made = Timm((3, 32, 32), TINY, embedding_size=embedding_size, normalize=True).eval()
    plain = Timm((3, 32, 32), TINY, embedding_size=embedding_size).eval()
    plain.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.allclose(made(inputs).norm(dim=1), torch.ones(4))
        assert torch.allclose(made(inputs), plain(inputs) / plain(inputs).norm(dim=1, keepdim=True), atol=1e-6)
        assert not torch.allclose(plain(inputs).norm(dim=1), torch.ones(4), atol=0.01)


def test_a_part_is_found_by_its_dotted_name():
    model = Timm((1, 32, 32), TINY)
    assert part_of(model, "backbone") is model.backbone
    assert part_of(model, "backbone.layer1") is model.backbone.layer1


@pytest.mark.parametrize("name", ["backbon", "head.weight", "pool"])
def test_what_is_no_part_with_weights_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"no part '{name}' with weights: it has backbone, head, and what"):
        part_of(Timm((1, 32, 32), TINY), name)


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
    assert torch.equal(Flatten((7,))(inputs.reshape(-1, 8)[:, :7]), inputs.reshape(-1, 8)[:, :7])


def test_flatten_reduces_a_large_image_by_averaging():
    inputs = torch.rand(5, 3, 64, 20)
    model = Flatten((3, 64, 20))
    assert model.embedding_size == 3 * 32 * 20
    assert torch.allclose(model(inputs), inputs.view(5, 3, 32, 2, 20).mean(3).flatten(1))
    square = torch.rand(2, 1, 32, 32)
    assert torch.equal(Flatten((1, 32, 32))(square), square.flatten(1))
