"""Language models: the decoder of Llama, and the file formats that small ones are published in."""

from models.language.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
