"""`Transformer`: the sizes of a decoder; the weights, operations and bytes that follow from them.

A layer of width h has q = heads x head size, k = key-value heads x head size, and E experts of
feed-forward width f, of which a token uses e, beside a shared one of width g; c is 2 matrices of a
feed-forward part, or 3 of a gated one.

    weights   2 h q + 2 h k + c h (E f + g) + E h       of a layer; the last term is the router
    active    2 h q + 2 h k + c h (e f + g) + E h       per token
    kept      10 h + 4 q + 4 k + a (e f + g)            bytes per token for the backward pass, in 16
              bits, a = 4, or 8 of a gated one; of these 10 h are whole on every tensor rank

With q = k = h, E = 1, f = 4 h and c = 2 these are 12 h^2 and 34 h (Korthikanti et al. 2022). A
gated part keeps both projections, the activation and the product. Experts are divided over tensor
ranks as one matrix would be; expert parallelism is not modelled.
"""

from dataclasses import dataclass

from supple.core.spec import is_count

_COUNTS = (
    *("hidden_size", "num_layers", "num_heads", "seq_length", "vocab_size"),
    *("num_kv_heads", "head_size", "ffn_size", "num_experts", "experts_per_token"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """Sizes of a decoder of equal layers, with 16-bit activations. The defaults are those of
    GPT-2: a feed-forward width of 4h, no gate, one head shared with the embedding."""

    hidden_size: int
    num_layers: int
    num_heads: int
    seq_length: int
    """Tokens of one sample."""
    vocab_size: int
    stores_scores: bool = True
    """Whether attention stores all scores for the backward pass, 5 bytes per head and pair of
    tokens; False for FlashAttention (Dao et al. 2022)."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); None: one per head."""
    head_size: int | None = None
    """None: the width divided by the heads."""
    ffn_size: int | None = None
    """Width of the feed-forward part, of one expert; None: four times the width."""
    is_gated: bool = False
    """Whether the feed-forward part has three matrices (SwiGLU)."""
    num_experts: int = 1
    experts_per_token: int = 1
    shared_ffn_size: int = 0
    """Width of an expert that every token uses beside the others; 0: none."""
    is_tied: bool = True
    """Whether the head shares its weights with the embedding."""
    num_other: int | None = None
    """Parameters besides matrices and embeddings: norms, biases, positions; None: as GPT-2,
    or as Llama where it is gated (two norms a layer)."""

    def __post_init__(self) -> None:
        given = [value for name in _COUNTS if (value := getattr(self, name)) is not None]
        if not all(map(is_count, given)):
            raise ValueError(
                f"{self}: every size must be a whole number of at least 1. Give the sizes of a "
                "model that can run."
            )
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"{self}: {self.hidden_size} does not divide into {self.num_heads} heads, and the "
                "width of a head must be whole. Change one of them."
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"{self}: {self.num_heads} heads do not divide into {self.kv_heads} key-value "
                "heads: each serves the same number of heads. Change one of them."
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"{self}: a token uses {self.experts_per_token} of {self.num_experts} experts. "
                "Swap the two."
            )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def ffn(self) -> int:
        return self.ffn_size or 4 * self.hidden_size

    @property
    def attention_width(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices."""
        return self._weights(self.num_experts)

    @property
    def active_weights(self) -> int:
        """Weights of a layer's matrices that a token uses."""
        return self._weights(self.experts_per_token)

    def _weights(self, num_experts: int) -> int:
        h = self.hidden_size
        router = self.num_experts * h if self.num_experts > 1 else 0
        ffn = (3 if self.is_gated else 2) * (num_experts * self.ffn + self.shared_ffn_size)
        return h * (2 * self.attention_width + 2 * self.kv_width + ffn) + router

    @property
    def whole_bytes(self) -> int:
        """Bytes kept per token of a layer on every tensor rank."""
        return 10 * self.hidden_size

    @property
    def kept_bytes(self) -> int:
        """Bytes kept per token of a layer for the backward pass, without scores."""
        ffn = self.experts_per_token * self.ffn + self.shared_ffn_size
        heads = 4 * self.attention_width + 4 * self.kv_width
        return self.whole_bytes + heads + (8 if self.is_gated else 4) * ffn

    @property
    def score_bytes(self) -> float:
        """Bytes stored per token for the attention scores of one layer."""
        return 5.0 * self.num_heads * self.seq_length if self.stores_scores else 0.0

    def embedding_weights(self, num_stages: int = 1) -> int:
        """Weights of embedding and head on the fuller of the first and the last stage."""
        copies = 1 if self.is_tied or num_stages > 1 else 2
        return copies * self.vocab_size * self.hidden_size

    @property
    def other_weights(self) -> int:
        """Norms, biases and positions."""
        h = self.hidden_size
        if self.num_other is not None:
            return self.num_other
        if self.is_gated:
            return (2 * self.num_layers + 1) * h
        return 13 * h * self.num_layers + self.seq_length * h

    @property
    def num_parameters(self) -> int:
        outside = self.embedding_weights() + self.other_weights
        return self.num_layers * self.layer_weights + outside

    @property
    def num_active_parameters(self) -> int:
        """Parameters that a token uses."""
        outside = self.embedding_weights() + self.other_weights
        return self.num_layers * self.active_weights + outside

    @property
    def cache_bytes(self) -> float:
        """Bytes of the keys and values of one token in one layer, in 16 bits."""
        return 4.0 * self.kv_width
