"""
A small world in which it can be measured whether a generated voice follows the reference.

A clip is a sentence of words. Its audio tokens carry what is said, which the prompt gives, and who says it: the voice
is a filter that acts on the words, and which nothing but the reference reveals. The filter swings with the sentence:
what it raises in one word it lowers in another, by a rhythm that all speakers share, so that it can't be had by
averaging a recording, only by reading the recording in time. The video tokens carry a face, which the first frame
gives, and the mouth's shapes in time with the words.
"""

from dataclasses import dataclass

import torch

from ..denoising import TextContext


VOCABULARY = 24
WORDS_PER_SENTENCE = 6
TOKENS_PER_WORD = 2
# The end of another sentence. A whole one would lie a whole sentence before the target, and a model that reads time
# modulo a sentence would not notice where it lies.
WORDS_PER_REFERENCE = 4
SENTENCE_TOKENS = WORDS_PER_SENTENCE * TOKENS_PER_WORD
AUDIO_CHANNELS = 16
FACE_CHANNELS = 8
MOUTH_CHANNELS = 8
VIDEO_CHANNELS = FACE_CHANNELS + MOUTH_CHANNELS
VIDEO_TEXT_WIDTH, AUDIO_TEXT_WIDTH = 32, 64
# A latent frame for each word after the first frame, which shows the face with its mouth closed.
LATENT_SIZE = (WORDS_PER_SENTENCE + 1, 1, 1)
# So that a latent frame of 8 frames lasts as long as a word of 2 audio latents, 0.08 s.
FRAME_RATE = 100.0

# The sign with which the voice acts on each word of a sentence: it sums to zero.
SWING = (1, -1, -1, 1, 1, -1)

_SEED = 1234
_FILTER_DIMENSIONS = 6
_FILTER_DEPTH = 0.75
_RECORDING_NOISE = 0.1


@dataclass(frozen=True)
class Scenes:
    """
    Clips of some people, one for each row, with a recording of the same person saying another sentence.

    Attributes:
        words (`torch.Tensor`): What is said, `[B, words]`.
        filters (`torch.Tensor`): Who says it, `[B, AUDIO_CHANNELS]`.
        context (`TextContext`): The prompt as the text connectors would give it.
        video_tokens (`torch.Tensor`): Clean, `[B, words + 1, VIDEO_CHANNELS]`.
        audio_tokens (`torch.Tensor`): Clean, `[B, 2 * words, AUDIO_CHANNELS]`.
        reference_words (`torch.Tensor`): What is said in the recording, `[B, reference words]`.
        reference_tokens (`torch.Tensor`): The recording, `[B, 2 * reference words, AUDIO_CHANNELS]`.
    """

    words: torch.Tensor
    filters: torch.Tensor
    context: TextContext
    video_tokens: torch.Tensor
    audio_tokens: torch.Tensor
    reference_words: torch.Tensor
    reference_tokens: torch.Tensor


class IdentityWorld:
    """The fixed part of the world: how each word sounds, looks and is written, and which filters voices may have."""

    def __init__(self):
        generator = torch.Generator().manual_seed(_SEED)
        self.sounds = 2.0 * torch.randint(0, 2, (VOCABULARY, TOKENS_PER_WORD, AUDIO_CHANNELS), generator=generator) - 1
        mouths = torch.randn(VOCABULARY, MOUTH_CHANNELS, generator=generator)
        self.mouths = mouths / mouths.norm(dim=1, keepdim=True) * MOUTH_CHANNELS**0.5
        widths = (VIDEO_TEXT_WIDTH, AUDIO_TEXT_WIDTH)
        self._written = [torch.randn(VOCABULARY, width, generator=generator) for width in widths]
        self._places = [torch.randn(WORDS_PER_SENTENCE, width, generator=generator) for width in widths]
        self._filter_basis = torch.randn(_FILTER_DIMENSIONS, AUDIO_CHANNELS, generator=generator)
        self._swing = torch.tensor(SWING, dtype=torch.float32).repeat_interleave(TOKENS_PER_WORD)

    def speakers(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """
        Draws people.

        Args:
            count (`int`): How many.
            generator (`torch.Generator`): Who.

        Returns:
            `torch.Tensor`: Their filters, by how much each raises a channel, `[count, AUDIO_CHANNELS]` in (-1, 1).
        """
        traits = torch.randn(count, _FILTER_DIMENSIONS, generator=generator)
        return _FILTER_DEPTH * torch.tanh(1.5 * traits @ self._filter_basis / _FILTER_DIMENSIONS**0.5)

    def swing(self, num_tokens: int) -> torch.Tensor:
        """The sign with which a voice acts on each token of a recording that ends with a sentence, `[num_tokens]`."""
        return self._swing.repeat(-(-num_tokens // SENTENCE_TOKENS))[-num_tokens:]

    def say(self, words: torch.Tensor, filters: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """
        Audio tokens of sentences.

        Args:
            words (`torch.Tensor`): `[B, words]`; fewer than a sentence are its end, more are several sentences.
            filters (`torch.Tensor`): The voices, `[B, AUDIO_CHANNELS]`.
            generator (`torch.Generator`): Of the recording's noise.

        Returns:
            `torch.Tensor`: `[B, TOKENS_PER_WORD * words, AUDIO_CHANNELS]`.
        """
        clean = self.sounds[words].flatten(1, 2)
        voiced = clean * (1 + self.swing(clean.shape[1])[:, None] * filters[:, None])
        return voiced + _RECORDING_NOISE * torch.randn(voiced.shape, generator=generator)

    def film(self, words: torch.Tensor, faces: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """
        Video tokens: in each latent frame the face, and the mouth's shape for the word that is said then.

        Args:
            words (`torch.Tensor`): `[B, WORDS_PER_SENTENCE]`.
            faces (`torch.Tensor`): `[B, FACE_CHANNELS]`.
            generator (`torch.Generator`): Of the picture's noise.

        Returns:
            `torch.Tensor`: `[B, WORDS_PER_SENTENCE + 1, VIDEO_CHANNELS]`.
        """
        mouths = torch.nn.functional.pad(self.mouths[words], (0, 0, 1, 0))
        tokens = torch.cat([faces[:, None].expand(-1, mouths.shape[1], -1), mouths], dim=2)
        return tokens + _RECORDING_NOISE * torch.randn(tokens.shape, generator=generator)

    def prompt(self, words: torch.Tensor) -> TextContext:
        """The sentence as the transformer reads it: for each word which it is and where it stands."""
        video, audio = (written[words] + places for written, places in zip(self._written, self._places))
        return TextContext(video, audio)

    def scenes(
        self,
        filters: torch.Tensor,
        generator: torch.Generator,
        reference_words: int = WORDS_PER_REFERENCE,
    ) -> Scenes:
        """
        Draws a clip of each of some people, and a recording that says other words.

        Args:
            filters (`torch.Tensor`): Their voices, `[B, AUDIO_CHANNELS]`.
            generator (`torch.Generator`): Of all that is drawn.
            reference_words (`int`, *optional*, defaults to `4`): Length of the recordings, which end with a sentence.

        Returns:
            [`Scenes`]: One for each row of `filters`.
        """
        order = torch.rand(len(filters), VOCABULARY, generator=generator).argsort(dim=1)
        words, others = order.split([WORDS_PER_SENTENCE, VOCABULARY - WORDS_PER_SENTENCE], dim=1)
        spoken = others[:, torch.arange(reference_words) % others.shape[1]]
        faces = torch.randn(len(filters), FACE_CHANNELS, generator=generator)
        return Scenes(
            words=words,
            filters=filters,
            context=self.prompt(words),
            video_tokens=self.film(words, faces, generator),
            audio_tokens=self.say(words, filters, generator),
            reference_words=spoken,
            reference_tokens=self.say(spoken, filters, generator),
        )

    def heard_words(self, audio_tokens: torch.Tensor) -> torch.Tensor:
        """The word that each pair of audio tokens is closest to, whatever the voice, `[B, words]`."""
        spoken = audio_tokens.reshape(len(audio_tokens), -1, TOKENS_PER_WORD * AUDIO_CHANNELS)
        return (spoken @ self.sounds.flatten(1).T).argmax(dim=-1)

    def seen_words(self, video_tokens: torch.Tensor) -> torch.Tensor:
        """The word that each mouth's shape is closest to, `[B, WORDS_PER_SENTENCE]`."""
        shapes = video_tokens[:, 1:, FACE_CHANNELS:]
        return torch.cdist(shapes, self.mouths[None]).argmin(dim=-1)

    def heard_filters(self, audio_tokens: torch.Tensor, swing: torch.Tensor | None = None) -> torch.Tensor:
        """
        The voice of a recording, estimated by least squares given the words that are heard in it.

        Args:
            audio_tokens (`torch.Tensor`): `[B, tokens, AUDIO_CHANNELS]`.
            swing (`torch.Tensor`, *optional*): Of these tokens; that of a recording that ends with a sentence.

        Returns:
            `torch.Tensor`: `[B, AUDIO_CHANNELS]`.
        """
        sounds = self.sounds[self.heard_words(audio_tokens)].flatten(1, 2)
        swing = self.swing(audio_tokens.shape[1]) if swing is None else swing
        return ((audio_tokens * sounds - 1) * swing[:, None]).mean(dim=1)

    def similarity(self, audio_tokens: torch.Tensor, reference_tokens: torch.Tensor) -> torch.Tensor:
        """Cosine between the voices heard in two recordings, `[B]`: about 0 for two strangers, 1 for one person."""
        heard, reference = self.heard_filters(audio_tokens), self.heard_filters(reference_tokens)
        return torch.cosine_similarity(heard, reference, dim=-1)
