"""MLP and LeNet: the paper's sizes, torch's numbers, adapters, and that they learn digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from support import data, require

import lorax
from lorax import intercept, tree
from lorax.models.vision import MLP, LeNet, LeNetConfig, MLPConfig, example


def draw(shapes, seed=0):
    """Random leaves of these shapes, biases too, that keep the size of what passes through."""
    rng = np.random.default_rng(seed)
    one = lambda x: 1.5 * rng.standard_normal(x.shape) / np.prod(x.shape[:-1]) ** 0.5
    return jax.tree.map(lambda x: jnp.asarray(one(x), jnp.float32), shapes)


def start(module):
    return draw(jax.eval_shape(module.init, jax.random.key(0), example(module.config))["params"])


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (MLP(MLPConfig()), 199_210),
        (MLP(MLPConfig(widths=(3072, 200, 200, 10))), 656_810),
        (LeNet(LeNetConfig()), 44_426),
        (LeNet(LeNetConfig(image_size=32, num_channels=3)), 62_006),
    ],
    ids=["MNIST FC", "CIFAR FC", "MNIST LeNet", "CIFAR LeNet"],
)
def test_parameters_are_as_many_as_in_the_paper(module, count):
    params = jax.eval_shape(module.init, jax.random.key(0), example(module.config))["params"]
    assert tree.count(params) == count
    assert {"head/kernel", "head/bias", "dense_1/kernel", "dense_2/bias"} < {*tree.flatten(params)}


def test_weights_start_he_normal():
    module = LeNet(LeNetConfig())
    params = tree.flatten(jit(module.init)(jax.random.key(0), example(module.config))["params"])
    assert all(not leaf.any() for path, leaf in params.items() if path.endswith("bias"))
    for path in ("dense_1/kernel", "conv_2/kernel"):
        n_in = np.prod(params[path].shape[:-1])
        assert abs(np.std(params[path]) / (2 / n_in) ** 0.5 - 1) < 0.05, path


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_are_those_of_torch(channels):
    torch = require("torch")
    image = np.random.default_rng(1).standard_normal((2, 28, 28, channels)).astype(np.float32)
    x = torch.from_numpy(image)
    f = torch.nn.functional

    lenet = LeNet(LeNetConfig(num_channels=channels, labels=7))
    params = start(lenet)
    p = {path: torch.from_numpy(np.array(leaf)) for path, leaf in tree.flatten(params).items()}
    y = x.permute(0, 3, 1, 2)
    for name in ("conv_1", "conv_2"):
        y = f.conv2d(y, p[f"{name}/kernel"].permute(3, 2, 0, 1), p[f"{name}/bias"])
        y = f.max_pool2d(torch.relu(y), 2)
    y = y.permute(0, 2, 3, 1).reshape(2, -1)  # as Keras and Flax flatten: channels last
    for name in ("dense_1", "dense_2"):
        y = torch.relu(y @ p[f"{name}/kernel"] + p[f"{name}/bias"])
    want = (y @ p["head/kernel"] + p["head/bias"]).numpy()
    scores = jit(lenet.apply)({"params": params}, image)
    assert scores.shape == (2, 7) and scores.dtype == jnp.float32 and np.ptp(want) > 1
    np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)

    mlp = MLP(MLPConfig(widths=(784 * channels, 30, 20, 25, 10)))
    params = start(mlp)
    p = {path: torch.from_numpy(np.array(leaf)) for path, leaf in tree.flatten(params).items()}
    y = x.reshape(2, -1)
    for name in ("dense_1", "dense_2", "dense_3"):
        y = torch.relu(y @ p[f"{name}/kernel"] + p[f"{name}/bias"])
    want = (y @ p["head/kernel"] + p["head/bias"]).numpy()
    scores = jit(mlp.apply)({"params": params}, image)
    assert np.ptp(want) > 1
    np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [MLP(MLPConfig((48, 12, 8, 4))), LeNet(LeNetConfig(labels=4))])
def test_an_adapted_model_is_its_merged_self(module):
    params = start(module)
    shape = (3, *module.config.image_shape)
    images = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    sites = intercept.sites(module, params, images)
    assert {path for path in tree.flatten(params) if path.endswith("kernel")} == {*sites}
    method = lorax.method("lora", rank=2, alpha=1, targets=("re:.*/kernel",))
    state = method.init(jax.random.key(0), params, sites)
    state = state._replace(trainable=draw(state.trainable, seed=2))
    run = jit(lambda params: lorax.apply(module, params, images))
    adapted = run(method.bind(*state, params))
    np.testing.assert_allclose(run(lorax.merge(method, state, params, sites)), adapted, atol=1e-4)
    assert np.abs(adapted - run(params)).max() > 0.1


@pytest.mark.parametrize("module", [MLP(MLPConfig((784, 32, 10))), LeNet(LeNetConfig())])
def test_it_learns_digits(module):
    with np.load(data("mnist/mnist.npz")) as arrays:
        images = arrays["x_train"][:128, ..., None].astype(np.float32) / 255
        labels = arrays["y_train"][:128].astype(np.int32)
    params = jit(module.init)(jax.random.key(0), images[:1])["params"]
    optimizer = optax.sgd(0.05, momentum=0.9)

    def loss(params):
        scores = module.apply({"params": params}, images)
        right = jnp.mean(jnp.argmax(scores, axis=-1) == labels)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean(), right

    @jit
    def step(params, state):
        (_, right), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, right

    state = optimizer.init(params)
    for _ in range(40):
        params, state, right = step(params, state)
    assert right > 0.9  # a tenth by chance


def test_bfloat16_computes_in_half_and_answers_in_float32():
    images = np.random.default_rng(1).standard_normal((2, 28, 28, 1)).astype(np.float32)
    for model, config in ((MLP, MLPConfig), (LeNet, LeNetConfig)):
        params = start(model(config()))
        run = lambda dtype, m=model, c=config, p=params: jit(m(c(dtype=dtype)).apply)(
            {"params": p}, images
        )
        half, full = run("bfloat16"), run("float32")
        assert half.dtype == jnp.float32
        error = np.abs(half - full).max()
        assert 1e-5 < error < 0.05 * np.abs(full).max()


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (MLP(MLPConfig()), (2, 32, 32, 3), r"images of 3072 values, but widths\[0\] is 784"),
        (LeNet(LeNetConfig()), (2, 32, 32, 3), r"images of \(32, 32, 3\).*say \(28, 28, 1\)"),
    ],
)
def test_images_of_another_size_are_an_error(module, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), np.zeros(shape, np.float32))
