"""How many parameters published models have, by family, size and vocabulary: (count, tolerance).

To the last parameter where the weights are public or a sum is printed, and else as far as a name
says it.
"""

GPT3 = {
    # Brown et al. 2020, table 2.1; for 1.3b and 13b the paper's FLOP column / (6 x 300e9 tokens).
    "125m": (125e6, 0.01),
    "350m": (356e6, 0.01),
    "760m": (760e6, 0.01),
    "1.3b": (1.3157e9, 1e-4),
    "2.7b": (2.65e9, 0.01),
    "6.7b": (6.66e9, 0.01),
    "13b": (12.853e9, 1e-4),
    "175b": (174.6e9, 1e-3),
}
LLAMA = {
    # Touvron et al. 2023, table 2, and for 7b the exact count of its released weights.
    "7b": (6_738_415_616, 0),
    "13b": (13.0e9, 0.01),
    "33b": (32.5e9, 0.01),
    "65b": (65.2e9, 0.01),
    "2-7b": (6_738_415_616, 0),
    "2-13b": (13_015_864_320, 0),
    "2-34b": (33_743_970_304, 0),
    "2-70b": (68_976_648_192, 0),
}
LLAMA3 = {
    "3-8b": (8_030_261_248, 0),
    "3-70b": (70_553_706_496, 0),
    "3-405b": (405_853_388_800, 0),
}
PUBLISHED: dict[tuple[str, str, int], tuple[float, float]] = {
    **{("gpt3", size, 50_257): count for size, count in GPT3.items()},
    **{("llama", size, 32_000): count for size, count in LLAMA.items()},
    **{("llama", size, 128_256): count for size, count in LLAMA3.items()},
    ("bloom", "560m", 250_880): (559e6, 0.01),
    ("bloom", "1.1b", 250_880): (1.065e9, 0.01),
    ("bloom", "1.7b", 250_880): (1.722e9, 0.01),
    ("bloom", "3b", 250_880): (3.003e9, 0.01),
    ("bloom", "7.1b", 250_880): (7.07e9, 0.01),
    ("bloom", "176b", 250_880): (176_247_271_424, 0),
    ("baichuan", "7b", 64_000): (7_000_559_616, 0),
    ("baichuan", "13b", 64_000): (13_264_901_120, 0),
    ("baichuan", "2-7b", 125_696): (7.5e9, 0.01),
    ("baichuan", "2-13b", 125_696): (13_896_668_160, 0),
    ("moss", "16b", 107_008): (16_717_980_160, 0),
    ("opt", "125m", 50_272): (125e6, 0.01),
    ("opt", "350m", 50_272): (331e6, 0.01),  # the name is that of GPT-3's, whose tables are wider
    ("opt", "1.3b", 50_272): (1.3e9, 0.02),
    ("opt", "2.7b", 50_272): (2.65e9, 0.01),
    ("opt", "6.7b", 50_272): (6.66e9, 0.01),
    ("opt", "13b", 50_272): (12.85e9, 0.01),
    ("opt", "30b", 50_272): (30e9, 0.01),
    ("opt", "66b", 50_272): (66e9, 0.02),
    ("opt", "175b", 50_272): (175e9, 0.01),
    ("falcon", "7b", 65_024): (6_921_720_704, 0),
    ("falcon", "rw-1b", 50_304): (1_311_625_216, 0),
    ("falcon", "rw-7b", 65_024): (7.5e9, 0.01),
    ("falcon", "40b", 65_024): (41e9, 0.03),
    ("falcon", "180b", 65_024): (179.5e9, 0.01),
    ("gpt_neox", "20b", 50_432): (20.6e9, 0.01),
    ("gptj", "6b", 50_400): (6.05e9, 0.01),
    ("gpt_neo", "2.7b", 50_257): (2.65e9, 0.01),
    ("chatglm", "3-6b", 65_024): (6.24e9, 0.01),
    ("deepseek_v3", "671b", 129_280): (671_026_419_200, 0),
}
# With the head that its code ties to the table of tokens.
CHATGLM_6B_TIED = (6.17e9, 2e-3)
