"""Built-in probe texts for tokenizer parity: over 1,000 passages from a small seed of true variety.

Digits, scripts, combining marks, emoji, right-to-left text, code, markup, white space and control characters, each
alone and then joined across every kind of boundary, where pre-tokenizers differ.
"""

from __future__ import annotations

import random

SEEDS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1984, 3.14159 and 2,718,281 were only 10^6 of the 0x7fff numbers; version 1.02.003 came on 2024-02-29.",
    "Call +1 (555) 010-9999 at 07:05:09, pay $1,234.50 or €99,95 or ¥12000 (±5%).",
    "I'm sure they'll say we've won, it's what you'd expect, isn't it? DON'T SHOUT, I'LL GO, WE'RE DONE.",
    "‘Curly’ “quotes” – en dash — em dash … ellipsis • bullet § section ¶",
    "naïve café résumé Ångström Übermut ſtraße œuvre",
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323 combining marks, decomposed",
    "Привет, мир! Съешь ещё этих мягких французских булок.",
    "Ελληνικά: καλημέρα κόσμε, 42 φορές",
    "مرحبا بالعالم ١٢٣٤٥، كيف حالك؟",
    "שלום עולם, מה שלומך? 5 שקלים",
    "नमस्ते दुनिया १२३ किताब क्षत्रिय",
    "สวัสดีชาวโลก ๑๒๓ ไม่มีช่องว่าง",
    "你好，世界！二〇二四年一月三十一日，共１２３個。",
    "こんにちは世界。カタカナとひらがな、漢字ｶﾅ",
    "안녕하세요 세계 12시 34분",
    "Tiếng Việt có dấu: đường, nghiêng, thưởng",
    "🙂 👩‍👩‍👧‍👦 👍🏽 🇨🇭 ❤️‍🔥 🏴‍☠️ ☃",
    "½ ⅔ ² ³ ₁₂ ⅷ Ⅻ ① ㊿ 𝟙𝟚 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "∀x∈ℝ: ∑ᵢ xᵢ² ≥ 0 ⇒ √(x²) = |x| ≠ −∞ · ∂f/∂x ≈ ∇f",
    "def f(x: int, *, y=0x1F) -> list[str]:\n    \"\"\"Doc.\"\"\"\n\treturn [f'{i:>08.3f}' for i in range(x)]\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; } // done\r\n#include <stdio.h>\r\n",
    "SELECT id, COUNT(*) FROM t WHERE name LIKE '%x_1%' GROUP BY 1 HAVING COUNT(*) >= 10;",
    '<div class="a-b" id=\'c\'>&nbsp;&lt;T&gt;</div><!-- note --><br/>',
    '{"k": [1, 2.5e-10, true, null], "s": "a\\n\\"b\\"\\u00e9"}',
    "https://user:pw@example.org:8080/a/b-c_d.html?q=1&r=%20x#frag and me@example.org",
    "# Title\n\n* item 1\n* item 2\n\n| a | b |\n|---|---|\n| 1 | 22 |\n\n```sh\nls -la ~/x && echo $HOME\n```\n",
    "   three spaces before,   three between,   three after   ",
    "\t\ttabs\tand \t mixed \t\t runs\t",
    "lines\n\n\n\nand \n \n  blank \r\n\r\n ones\n",
    "no\u00a0break \u2003em space \u3000ideographic \u200bzero width \u2028separator \ufeffmark",
    "control \x00 \x01 \x07 \x08 \x0b \x0c \x1b[31m \x7f \x85 characters",
    "!!!??? ... ,,, ;;; --- ___ === *** ### @@@ ((([[[{{{}}}]]])))",
    "snake_case camelCase PascalCase kebab-case SCREAMING_SNAKE x1y2z3 v2beta10",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious Donaudampfschifffahrtsgesellschaftskapitän",
    "\ufffd replacement, private \ue000, noncharacter \U0010fffe, astral \U0001f9ff\U00020000",
    "a'b 'tis 'twas rock'n'roll 's 'S 't 'T '' '''",
    "7", " 7", "  77", "7 7  7   7", "007007007", "1a2b3c", "٣٫١٤", "x=1;y=22;z=333;w=4444;v=55555",
)  # fmt: skip

JOINTS = ("", " ", "  ", "\n", "\n\n", "\t", " \n ", "'", ",", "-", "1", " 12 ", "\u00a0", "é", "。", "🙂")

TURNS = ("Hello", "What is 12345 + 67890?", "Write `x = [1, 22, 333]`", "Ça va? 你好 🙂", "  indented\n\n\nlines  ", "")


def probe_texts(count: int = 1200) -> list[str]:
    """`count` distinct passages, always the same: every seed, then random cuts and joins of seeds."""
    chooser = random.Random(20240229)
    texts = dict.fromkeys(SEEDS)
    while len(texts) < count:
        parts = []
        for _ in range(chooser.randint(2, 5)):
            seed = chooser.choice(SEEDS)
            start = chooser.randrange(len(seed))
            parts.append(seed[start : start + chooser.randint(1, 60)])
        texts[chooser.choice(JOINTS).join(parts)] = None
    return list(texts)[:count]


def probe_conversations() -> list[list[dict[str, str]]]:
    """Conversations of one to five turns, with and without a system message."""
    conversations = []
    for index in range(24):
        turns = [
            {"role": "user" if turn % 2 == 0 else "assistant", "content": TURNS[(index + turn * 5) % len(TURNS)]}
            for turn in range(1 + index % 5)
        ]
        system = [{"role": "system", "content": SEEDS[index % len(SEEDS)]}] if index % 3 == 0 else []
        conversations.append(system + turns)
    return conversations
