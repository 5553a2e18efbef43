import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffusers_idlora import IDLoRAPrompt
from diffusers_idlora.prompt import prompt_text


# A busy machine is no reason to fail.
untimed = settings(deadline=None)

TAG = re.compile(r"\[[A-Za-z_]+\]:")

# Rich in brackets and colons, so that texts that nearly hold a tag are common.
texts = st.one_of(
    st.text(alphabet="[]: \nabV_1é", max_size=40),
    st.text(max_size=80),
).filter(lambda text: not TAG.search(text))


@st.composite
def prompts(draw):
    visual, speech, sounds = draw(texts), draw(texts), draw(texts)
    assume(any(part.strip() for part in (visual, speech, sounds)))
    return IDLoRAPrompt(visual=visual, speech=speech, sounds=sounds)


@untimed
@given(prompts())
def test_parsing_a_formatted_prompt_gives_the_prompt_back(prompt):
    assert IDLoRAPrompt.parse(str(prompt)) == prompt


@untimed
@given(prompts())
def test_formatting_a_parsed_prompt_gives_the_text_back(prompt):
    text = str(prompt)
    assert str(IDLoRAPrompt.parse(text)) == text


@untimed
@given(prompts())
def test_a_tagged_string_is_encoded_unchanged_and_as_its_prompt_object(prompt):
    assert prompt_text(str(prompt)) == str(prompt)
    assert prompt_text(prompt) == str(prompt)


@untimed
@given(texts.filter(str.strip))
def test_free_text_is_encoded_unchanged(text):
    assert prompt_text(text) == text


def test_a_prompt_is_formatted_as_the_adapters_were_trained():
    prompt = IDLoRAPrompt(visual="a man at a desk", speech="Good evening.", sounds="calm, a clock")
    assert str(prompt) == "[VISUAL]: a man at a desk [SPEECH]: Good evening. [SOUNDS]: calm, a clock"


def test_empty_parts_are_left_out_and_come_back_empty():
    prompt = IDLoRAPrompt(speech="Good evening.")
    assert str(prompt) == "[SPEECH]: Good evening."
    assert IDLoRAPrompt.parse(str(prompt)) == IDLoRAPrompt(visual="", speech="Good evening.", sounds="")


def test_tags_are_read_in_any_order_and_with_any_white_space():
    text = "  [SOUNDS]:\n calm  [VISUAL]:a desk\n[SPEECH]: Good evening.\n"
    assert IDLoRAPrompt.parse(text) == IDLoRAPrompt(visual="a desk", speech="Good evening.", sounds="calm")
    assert prompt_text(text) == text


def test_brackets_and_colons_that_are_no_tags_belong_to_the_text():
    prompt = IDLoRAPrompt(visual="a sign [EXIT] over: the door", speech="[laughs] It's 12:30.")
    assert IDLoRAPrompt.parse(str(prompt)) == prompt
    assert prompt_text("a sign [EXIT] at 12:30") == "a sign [EXIT] at 12:30"


def test_white_space_around_a_part_does_not_matter():
    assert IDLoRAPrompt(visual="  a desk\n") == IDLoRAPrompt(visual="a desk")


@pytest.mark.parametrize("read", [IDLoRAPrompt.parse, prompt_text])
@pytest.mark.parametrize("tag", ["MUSIC", "VISUALS", "visual", "Speech", "SOUND_EFFECTS"])
def test_an_unknown_tag_is_an_error_that_lists_the_tags(read, tag):
    with pytest.raises(ValueError, match=rf"`prompt`.*\[{tag}\].*VISUAL.*SPEECH.*SOUNDS"):
        read(f"[VISUAL]: a desk [{tag}]: something")


@pytest.mark.parametrize("read", [IDLoRAPrompt.parse, prompt_text])
def test_a_repeated_tag_is_an_error(read):
    with pytest.raises(ValueError, match=r"`prompt`.*\[SPEECH\] 2 times"):
        read("[SPEECH]: Good evening. [VISUAL]: a desk [SPEECH]: Good night.")


@pytest.mark.parametrize("read", [IDLoRAPrompt.parse, prompt_text])
def test_text_before_the_first_tag_is_an_error(read):
    with pytest.raises(ValueError, match="`prompt`.*'a man at a desk'"):
        read("a man at a desk [SPEECH]: Good evening.")


@pytest.mark.parametrize("part", ["visual", "speech", "sounds"])
@pytest.mark.parametrize("tag", ["[SPEECH]:", "[MUSIC]:", "[visual]:"])
def test_a_tag_inside_a_part_is_an_error_that_names_the_part(part, tag):
    with pytest.raises(ValueError, match=rf"`{part}` contains the tag '{re.escape(tag)}'"):
        IDLoRAPrompt(**{part: f"one thing {tag} another"})


@pytest.mark.parametrize("parts", [{}, {"visual": ""}, {"visual": " ", "speech": "\n", "sounds": "\t"}])
def test_a_prompt_without_any_text_is_an_error(parts):
    with pytest.raises(ValueError, match="`prompt` is empty.*`visual`, `speech` and `sounds`"):
        IDLoRAPrompt(**parts)


@pytest.mark.parametrize("text", ["[VISUAL]:", "[VISUAL]: [SPEECH]: \n[SOUNDS]:"])
def test_tags_without_any_text_are_an_error(text):
    with pytest.raises(ValueError, match="`prompt` is empty"):
        prompt_text(text)


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_an_empty_text_is_an_error_that_shows_it(text):
    with pytest.raises(ValueError, match=re.escape(f"`prompt` is {text!r}")):
        prompt_text(text)


@pytest.mark.parametrize("prompt", [None, 5, b"a desk", ("a", "b")])
def test_anything_but_a_text_or_a_prompt_is_an_error_that_names_its_type(prompt):
    with pytest.raises(ValueError, match=f"`prompt` is of the type {type(prompt).__name__}"):
        prompt_text(prompt)
