"""Canonical names of a BERT that is the text tower of a dual encoder."""

_BERT = r"text\.(?:bert|transformer)"  # as a module of our own, or of open_clip's wrapper
_LAYER = rf"{_BERT}\.encoder\.layer\.(\d+)"
RULES = [
    (rf"{_BERT}\.embeddings\.word_embeddings", "text.token_embed"),
    (rf"{_BERT}\.embeddings\.position_embeddings", "text.pos_embed"),
    (rf"{_BERT}\.embeddings\.LayerNorm", "text.norm_pre"),
    (rf"{_LAYER}\.attention\.self\.query", r"text.\1.attn.q"),
    (rf"{_LAYER}\.attention\.self\.key", r"text.\1.attn.k"),
    (rf"{_LAYER}\.attention\.self\.value", r"text.\1.attn.v"),
    (rf"{_LAYER}\.attention\.output\.dense", r"text.\1.attn.out"),
    (rf"{_LAYER}\.attention\.output\.LayerNorm", r"text.\1.norm1"),
    (rf"{_LAYER}\.intermediate\.dense", r"text.\1.mlp.fc1"),
    (rf"{_LAYER}\.output\.dense", r"text.\1.mlp.fc2"),
    (rf"{_LAYER}\.output\.LayerNorm", r"text.\1.norm2"),
]  # module paths -> canonical names
