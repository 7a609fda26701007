"""From text to statistics: windows of tokens, the streamed model, sums over its activations."""
