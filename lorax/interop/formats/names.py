"""What a matrix of a language model is called: by each format, and by Hugging Face.

    llama.cpp    blk.3.attn_q                                 model.layers.3.self_attn.q_proj
    torchtune    layers.3.attn.q_proj                         as well
    Meta         layers.3.attention.wq                        as well
    Megatron     decoder.layers.3.self_attention.linear_proj  model.layers.3.self_attn.o_proj
    tunix        layers.3.attn.q_proj                         as torchtune
    Tinker       model.unembed_tokens                         lm_head

These are the names of LLaMA and of the many families that are built like it. MLX and PEFT have
Hugging Face's own.
"""

import re

#: By the end of a name in a layer; Hugging Face's name is below `model.layers.N`.
_GGUF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_META = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_TORCHTUNE = {f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"}
_TORCHTUNE |= {f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
_TORCHTUNE |= {
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_MEGATRON = {f"self_attention.linear_qkv.{x}": f"self_attn.{x}_proj" for x in "qkv"}
_MEGATRON |= {
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc1.gate": "mlp.gate_proj",
    "mlp.linear_fc1.up": "mlp.up_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "model.unembed_tokens": "lm_head",
}
_LAYER = re.compile(r"(?P<start>blk|layers|(?:.+\.)?decoder\.layers)\.(?P<n>\d+)\.(?P<end>.+)")
_LANGUAGE = re.compile(r"(language_model\.)?(model\.(layers\.\d+\..+|embed_tokens)|lm_head)")
_EXPERT = re.compile(r"(?P<start>.+\.experts\.\d+)\.(?P<end>w[123])")
_W = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def hugging_face(layer: str) -> str:
    """Hugging Face's name of a matrix that a format calls `layer`; the name itself if it is another
    or if what it stands for depends on the base."""
    if match := _LAYER.fullmatch(layer):
        ends = _TORCHTUNE | _META if match["start"] == "layers" else _MEGATRON
        ends = _GGUF if match["start"] == "blk" else ends
        if match["end"] in ends:
            return f"model.layers.{match['n']}.{ends[match['end']]}"
    if match := _EXPERT.fullmatch(layer):
        return f"{match['start']}.{_W[match['end']]}"
    return _WHOLE.get(layer, layer)


def language(layer: str) -> str | None:
    """Hugging Face's name of a matrix of a language model like LLaMA, None if it is not known."""
    name = hugging_face(layer)
    return name if _LANGUAGE.fullmatch(name) else None


def llama_cpp(layer: str) -> str | None:
    """llama.cpp's name of a matrix with Hugging Face's name, None if it is not one of the above."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", layer)
    end = match and {theirs: ours for ours, theirs in _GGUF.items()}.get(match[2])
    if end:
        return f"blk.{match[1]}.{end}"
    return {"model.embed_tokens": "token_embd", "lm_head": "output"}.get(layer)
