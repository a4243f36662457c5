"""Named architectures have exactly as many parameters as the models they are named after."""

import copy

import jax
import jax.numpy as jnp
from support import require

from lorax import tree
from lorax.models import decoder, decoder_families
from lorax.models.shapes import ARCHITECTURES

#: As the files of the released models have them; a tied head is counted once.
COUNTS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "mistral-7b": 7_241_732_096,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "ministral-8b": 8_019_808_256,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
    "granite3.3-2b": 2_533_539_840,
    "granite3.3-8b": 8_170_864_640,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "phi3-mini": 3_821_079_552,
    "phi3-medium": 13_960_238_080,
    "phi4-mini": 3_836_021_760,
    "phi4": 14_659_507_200,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "gpt-oss-20b": 20_914_757_184,
}
OF_DECODERS = {
    name: fields
    for name, fields in ARCHITECTURES.items()
    if fields["model_type"] in decoder_families.FAMILIES
}


def test_decoders_are_as_large_as_the_released_models():
    assert OF_DECODERS.keys() == COUNTS.keys()
    token = jnp.zeros((1, 1), jnp.int32)
    for name, fields in OF_DECODERS.items():
        module = decoder.Decoder(decoder_families.config_from_hf(fields))
        params = jax.eval_shape(module.init, jax.random.key(0), token)["params"]
        assert tree.count(params) == COUNTS[name], name


def test_transformers_reads_a_named_decoder_as_we_do():
    """Most of them are written as files were before transformers 5."""
    transformers = require("transformers")
    for name, fields in OF_DECODERS.items():
        theirs = transformers.AutoConfig.for_model(**copy.deepcopy(fields)).to_dict()
        ours = decoder_families.config_from_hf(fields)
        assert ours == decoder_families.config_from_hf(theirs), name
