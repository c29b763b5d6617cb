"""The vocabulary of a model from nothing."""

from speechgpt.language.scratch import train_tokenizer

TEXTS = ["what is two plus three", "two plus three is five"] * 50


def test_known_words_are_one_token_and_any_text_can_be_written():
    tokenizer = train_tokenizer(TEXTS, 400)
    assert tokenizer.convert_ids_to_tokens(tokenizer("what is two").input_ids) == ["Ġwhat", "Ġis", "Ġtwo"]
    for text in ("naïve café", "数は二", "a\nb", "<x>"):
        assert tokenizer.decode(tokenizer(text).input_ids).strip() == text


def test_special_tokens_come_first_and_padding_is_on_the_left():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) <= 300


def test_the_same_texts_give_the_same_vocabulary():
    assert train_tokenizer(TEXTS, 400).get_vocab() == train_tokenizer(TEXTS, 400).get_vocab()
