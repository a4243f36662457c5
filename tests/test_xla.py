import jax
import pytest

from lorax import xla


def test_only_options_that_this_compiler_has_are_left():
    options = {"xla_backend_optimization_level": 0, "xla_no_such_option": True}
    assert xla.known(options) == {"xla_backend_optimization_level": 0}


def test_a_wrong_value_of_an_option_that_there_is_stays_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_backend_optimization_level"):
        xla.known({"xla_backend_optimization_level": "many"})
