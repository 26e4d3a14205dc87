"""Makes prompt_ids.json: hard prompts with the ids that two tokenizers we did not write give them.

pip download --no-deps clip-anytorch==2.6.0 && pip install ftfy regex transformers
python tests/data/make_prompt_ids.py clip_anytorch-2.6.0-py3-none-any.whl

openai: `clip/simple_tokenizer.py` of the wheel (OpenAI's own code). hf: transformers' CLIPTokenizer on the
vocabulary of the same file. Both without start, end and truncation.
"""

import importlib.util
import json
import sys
import tempfile
import zipfile
from pathlib import Path

WORDS = (
    (
        "a photo of an astronaut riding a horse|RED Heart|Ein Mädchen mit dem Perlenohrring|café naïve façade|"
        "Ångström ÅNGSTRÖM ångström|e\u0301 decomposed accent|ﬁne ﬂow ligatures|ｆｕｌｌ ｗｉｄｔｈ|日本語のプロンプト|"
        "一只猫在月球上|고양이 그림|ภาพแมว|कुत्ता और बिल्ली|صورة قطة|תמונה של חתול|Кот в сапогах|γάτα στο φεγγάρι|"
        "ΣΊΣΥΦΟΣ final sigma|İstanbul ıspanak|straße STRASSE ẞ|🐱|🐱🐶 cat and dog|👩\u200d🚀 astronaut|🇩🇪 flag|"
        "👍🏽 thumbs|❤️ heart|☃ snowman ☃️|fish &amp; chips|&lt;b&gt;bold&lt;/b&gt;|&amp;lt; double|&copy; 2024|"
        "&notanentity; x|&#8217;s|it's|IT'S|they're we've I'm he'll she'd don't|it’s curly|“quoted” ‘single’|"
        "rock 'n' roll|'s|''s|1234567890|3.14159|1,000,000|v1.5|2×2|½ ¾|Ⅷ Roman|① circled|x² + y₂|\tTabs\tand\n"
        "newlines\r\n|  spaces   everywhere  |no\u00a0break|zero\u200bwidth|soft\u00adhyphen|bell\x07 here|"
        "null\x00byte|"
        "del\x7f|esc\x1b[31m|\u202eright to left|\ufeffbom|schÃ¶n mojibake|â€œmojibake quotesâ€\x9d|"
        "(masterpiece:1.3), [bad], {x}|a,b;c:d.e!f?|!!!!!!|???!!!|...|—em dash– en|C++ and C#|user@example.com|"
        "https://example.com/a?b=c&d=e|#hashtag @mention|50% off|$100 €20 £5 ¥300|snake_case_name|CamelCaseWord|"
        "supercalifragilisticexpialidocious|aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa|lowerUPPERlower|<|startoftext|>|"
        "<|endoftext|>|text <|endoftext|> more|\\n escaped|back\\slash|tilde~ caret^|`code`|ñandú|Žluťoučký kůň|"
        "Ελληνικά|Türkçe ğüşıöç|Tiếng Việt rất đẹp|naïve résumé|Œuvre œ Æ æ|ĳ Ĳ|ǅ titlecase|ﷺ|𝔉𝔯𝔞𝔨𝔱𝔲𝔯|𝓈𝒸𝓇𝒾𝓅𝓉|"
        "🅰️🅱️|꧁꧂|\u0345 iota|ſ long s|K Kelvin|Å Angstrom sign|ﾊﾝｶｸ half width|㎏ ㍿|\u3000ideographic space\u3000|"
        "trailing space |x|A||I|0|é|ß|中|🦄"
    )
    .replace("<|startoftext|>", "<\0startoftext\0>")
    .replace("<|endoftext|>", "<\0endoftext\0>")
)


def prompts() -> list[str]:
    base = [word.replace("\0", "|") for word in WORDS.split("|")]
    base = [word.replace("null|byte", "null\0byte") for word in base]
    mixed = [f"{a}, {b}" for a, b in zip(base, base[1:] + base[:1], strict=True)]
    styled = [f"A Painting of {word} by Greg Rutkowski, 4K, HDR'd" for word in base[::2]]
    long = [
        "very " * 100 + "long",
        " ".join(base),
        "日本語" * 60,
        "🐱" * 90,
        "1" * 200,
        "word," * 80,
    ]
    return base + mixed + styled + long


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        path = Path(folder) / "clip" / "simple_tokenizer.py"
        spec = importlib.util.spec_from_file_location("simple_tokenizer", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        openai = module.SimpleTokenizer()

        from transformers import CLIPTokenizer

        merges = [" ".join(pair) for pair in openai.bpe_ranks]
        Path(folder, "vocab.json").write_text(json.dumps(openai.encoder))
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        hf = CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
        rows = [
            {
                "prompt": prompt,
                "openai": openai.encode(prompt),
                "hf": hf(prompt, add_special_tokens=False)["input_ids"],
            }
            for prompt in prompts()
        ]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    Path(__file__).with_name("prompt_ids.json").write_text(f"[\n{lines}\n]\n")
    print(f"{len(rows)} prompts")


if __name__ == "__main__":
    main(*sys.argv[1:])
