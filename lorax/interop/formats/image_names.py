"""What a matrix of an image model is called: by diffusers, whose names are used here, and others.

    diffusers  unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
    kohya      lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q
               or lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q of SDXL, whose authors'
               names these are
    ComfyUI    diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q
    PEFT       down_blocks.1..., without the component
               encoder.layers.1... of CLIP's text encoder in transformers 5, elsewhere text_model.

A flattened name gets its dots back by the words that U-Nets of Stable Diffusion and text encoders
of CLIP are made of. Transformers (Flux, SD3) have other modules in kohya's files than in
diffusers': `flux` has those of Flux.1.
"""

import re

#: Words with "_" in them, and others, of module paths.
_WORDS = """
down_blocks up_blocks mid_block transformer_blocks attentions resnets downsamplers upsamplers
to_q to_k to_v to_out proj_in proj_out conv_in conv_out conv_shortcut conv conv1 conv2
time_emb_proj time_embedding add_embedding linear_1 linear_2 attn1 attn2 ff net proj
text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2
text_projection embeddings token_embedding position_embedding
norm norm1 norm2 norm3 conv_norm_out layer_norm1 layer_norm2 final_layer_norm
""".split()
_TOKEN = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}|\d+)(_|$)")
_COMPONENTS = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_COMPONENTS |= {"lora_te2_": "text_encoder_2"}
#: First words below a component, by which it is known.
_FIRST = {"down_blocks": "unet", "up_blocks": "unet", "mid_block": "unet", "conv_in": "unet"}
_FIRST |= {"conv_out": "unet", "time_embedding": "unet", "add_embedding": "unet"}
_FIRST |= {"text_model": "text_encoder"}
_TRANSFORMER = "transformer_blocks single_transformer_blocks x_embedder context_embedder norm_out"
_FIRST |= dict.fromkeys(_TRANSFORMER.split(), "transformer") | {"time_text_embed": "transformer"}
#: Modules of CLIP's text encoder by transformers 5's names.
_CLIP = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
#: Names of the authors' U-Net that are not in its blocks, and those in a block's layers.
_OUTER = {"input_blocks_0_0": "conv_in", "out_2": "conv_out"}
_OUTER |= {"time_embed_0": "time_embedding.linear_1", "time_embed_2": "time_embedding.linear_2"}
_OUTER |= {"label_emb_0_0": "add_embedding.linear_1", "label_emb_0_2": "add_embedding.linear_2"}
_RESNET = {"in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj"}
_RESNET |= {"skip_connection": "conv_shortcut"}
_BLOCK = re.compile(
    r"(?P<way>input_blocks_(\d+)|middle_block|output_blocks_(\d+))_(\d+)_(?P<end>.+)"
)


def diffusers(layer: str) -> str | None:
    """diffusers' name of a matrix in a file of any of these formats, None if it is not known."""
    if match := re.fullmatch(r"(unet|text_encoder(_\d)?|transformer(_\d)?)\..+", layer):
        return match[0]
    if layer.startswith("diffusion_model."):
        layer = f"lora_unet_{layer.removeprefix('diffusion_model.').replace('.', '_')}"
    for prefix, component in _COMPONENTS.items():
        if layer.startswith(prefix):
            path = _dotted(layer.removeprefix(prefix))
            return path and f"{component}.{path}"
    if _CLIP.fullmatch(layer):
        return f"text_encoder.text_model.{layer}"
    component = _FIRST.get(layer.partition(".")[0])
    return component and f"{component}.{layer}"


def kohya(name: str, several: bool) -> str | None:
    """kohya's name of a matrix with diffusers' name, None for a transformer's. several: whether
    there are two text encoders."""
    prefixes = {component: prefix for prefix, component in _COMPONENTS.items()}
    prefixes["text_encoder"] = "lora_te1_" if several else "lora_te_"
    component, _, path = name.partition(".")
    return f"{prefixes[component]}{path.replace('.', '_')}" if component in prefixes else None


def _dotted(flat: str) -> str | None:
    """A module's path from its flattened one, None if a word is unknown."""
    if flat in _OUTER:
        return _OUTER[flat]
    if match := _BLOCK.fullmatch(flat):
        return _in_block(match)
    words, at = [], 0
    while at < len(flat):
        match = _TOKEN.match(flat, at)
        if match is None:
            return None
        words.append(match[1])
        at = match.end()
    return None if flat.endswith("_") else ".".join(words)


def _in_block(match: re.Match) -> str | None:
    """diffusers' path of a module in a block of the authors' U-Net, which numbers the layers of all
    blocks through: three to a block, of which the last of a block down is its downsampler."""
    _, down, up, inner, _ = match.groups()
    end, inner = match["end"], int(inner)
    if down is not None:
        block, layer = divmod(int(down) - 1, 3)
        around = f"down_blocks.{block}"
        if end == "op":
            return f"{around}.downsamplers.0.conv"
    elif up is not None:
        block, layer = divmod(int(up), 3)
        around = f"up_blocks.{block}"
        if end == "conv":
            return f"{around}.upsamplers.0.conv"
    else:
        around, layer, inner = "mid_block", inner // 2, inner % 2
    if inner == 0:
        end = _RESNET.get(end)
        return end and f"{around}.resnets.{layer}.{end}"
    end = _dotted(end)
    return end and f"{around}.attentions.{layer}.{end}"
