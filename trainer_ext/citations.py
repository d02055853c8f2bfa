"""Whom to cite for which optimizer, as BibTeX."""

from __future__ import annotations

_YEN = r"""@inproceedings{yen2023block,
  title = {Block Low-Rank Preconditioner with Shared Basis for Stochastic Optimization},
  author = {Yen, Jui-Nan and Duvvuri, Sai Surya and Dhillon, Inderjit S. and Hsieh, Cho-Jui},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""
_SOAP = r"""@misc{vyas2024soap,
  title = {{SOAP}: Improving and Stabilizing Shampoo using {Adam}},
  author = {Vyas, Nikhil and Morwani, Depen and Zhao, Rosie and Kwun, Mujin and Shapira, Itai and
            Brandfonbrener, David and Janson, Lucas and Kakade, Sham},
  year = {2024},
  eprint = {2409.11321},
  archivePrefix = {arXiv}
}"""
_SHAMPOO = r"""@inproceedings{gupta2018shampoo,
  title = {Shampoo: Preconditioned Stochastic Tensor Optimization},
  author = {Gupta, Vineet and Koren, Tomer and Singer, Yoram},
  booktitle = {International Conference on Machine Learning},
  year = {2018}
}"""
_ANIL = r"""@misc{anil2020scalable,
  title = {Scalable Second Order Optimization for Deep Learning},
  author = {Anil, Rohan and Gupta, Vineet and Koren, Tomer and Regan, Kevin and Singer, Yoram},
  year = {2020},
  eprint = {2002.09018},
  archivePrefix = {arXiv}
}"""
_SKETCHY = r"""@inproceedings{feinberg2023sketchy,
  title = {Sketchy: Memory-efficient Adaptive Regularization with Frequent Directions},
  author = {Feinberg, Vladimir and Chen, Xinyi and Sun, Y. Jennifer and Anil, Rohan and
            Hazan, Elad},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""
_ADABLOCK = r"""@misc{yun2022adablock,
  title = {{AdaBlock}: {SGD} with Practical Block Diagonal Matrix Adaptation for Deep Learning},
  author = {Yun, Jihun and Lozano, Aurelie and Yang, Eunho},
  year = {2022}
}"""
_ADAGRAD = r"""@article{duchi2011adaptive,
  title = {Adaptive Subgradient Methods for Online Learning and Stochastic Optimization},
  author = {Duchi, John and Hazan, Elad and Singer, Yoram},
  journal = {Journal of Machine Learning Research},
  volume = {12},
  year = {2011}
}"""
_ADA_FD = r"""@misc{wan2018efficient,
  title = {Efficient Convex Optimization with Frequent Directions},
  author = {Wan, Yuanyu and Zhang, Lijun},
  year = {2018}
}"""
_SON = r"""@inproceedings{luo2016efficient,
  title = {Efficient Second Order Online Learning by Sketching},
  author = {Luo, Haipeng and Agarwal, Alekh and Cesa-Bianchi, Nicol{\`o} and Langford, John},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2016}
}"""
_ADADIAG = r"""@misc{nguyen2025improving,
  title = {Improving Adaptive Moment Optimization via Preconditioner Diagonalization},
  author = {Nguyen, Son and Liu, Bo and Chen, Lizhang and Liu, Qiang},
  year = {2025},
  eprint = {2502.07488},
  archivePrefix = {arXiv}
}"""
_NG_PLUS = r"""@misc{yang2021ng,
  title = {{NG+}: A Multi-Step Matrix-Product Natural Gradient Method for Deep Learning},
  author = {Yang, Minghan and Xu, Dong and Cui, Qiwen and Wen, Zaiwen and Xu, Pengxiang},
  year = {2021},
  eprint = {2106.07454},
  archivePrefix = {arXiv}
}"""
_MUON = r"""@misc{jordan2024muon,
  title = {Muon: An optimizer for hidden layers in neural networks},
  author = {Jordan, Keller and Jin, Yuchen and Boza, Vlado and You, Jiacheng and Cesista, Franz and
            Newhouse, Laker and Bernstein, Jeremy},
  year = {2024},
  url = {https://kellerjordan.github.io/posts/muon/}
}"""
_KFAC = r"""@inproceedings{martens2015optimizing,
  title = {Optimizing Neural Networks with {Kronecker}-factored Approximate Curvature},
  author = {Martens, James and Grosse, Roger},
  booktitle = {International Conference on Machine Learning},
  year = {2015}
}"""
_PUIU = r"""@misc{puiu2022brand,
  title = {Brand New {K-FACs}: Speeding up {K-FAC} with Online Decomposition Updates},
  author = {Puiu, Constantin Octavian},
  year = {2022},
  eprint = {2210.08494},
  archivePrefix = {arXiv}
}"""
_SENG = r"""@article{yang2022sketch,
  title = {Sketch-Based Empirical Natural Gradient Methods for Deep Learning},
  author = {Yang, Minghan and Xu, Dong and Wen, Zaiwen and Chen, Mengyun and Xu, Pengxiang},
  journal = {Journal of Scientific Computing},
  year = {2022}
}"""

_CITATIONS: dict[str, tuple[str, ...]] = {
    "shared_basis_adagrad": (_YEN,),
    "shared_basis_adam": (_YEN,),
    "two_sided_basis": (_YEN, _SOAP),
    "shampoo": (_SHAMPOO, _ANIL),
    "sketchy": (_SKETCHY,),
    "block_adam": (_ADABLOCK,),
    "full_matrix_adagrad": (_ADAGRAD,),
    "ada_fd": (_ADA_FD,),
    "son_fd": (_SON,),
    "adadiag": (_ADADIAG,),
    "adadiag_pp": (_ADADIAG,),
    "adafacdiag": (_ADADIAG,),
    "adafacdiag_pp": (_ADADIAG,),
    "ng_plus": (_NG_PLUS,),
    "ng_plus_per_sample": (_NG_PLUS,),
    "soap": (_SOAP,),
    "muon": (_MUON,),
    "kfac": (_KFAC,),
    "rs_kfac": (_KFAC, _PUIU),
    "sre_kfac": (_KFAC, _PUIU),
    "b_kfac": (_PUIU,),
    "b_r_kfac": (_PUIU,),
    "b_kfac_c": (_PUIU,),
    "seng": (_SENG,),
}


def bibtex(name: str) -> str:
    """The BibTeX entries of an optimizer of the registry; empty for one from elsewhere."""
    return "\n\n".join(_CITATIONS.get(name, ()))
