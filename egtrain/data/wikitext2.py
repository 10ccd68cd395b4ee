"""WikiText-2, words as tokens (Merity et al. 2016, arXiv 1609.07843)."""

from egtrain.data.finding import Archive, DataSet, File, Layout

# As GluonNLP lists them.
_DIGESTS = (
    "863f29c46ef9d167fff4940ec821195882fe29d1",
    "0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422",
    "c7b8ce0aa086fb34dab808c5c49224211eb2b172",
)
WIKITEXT2 = DataSet(
    title="WikiText-2",
    layouts=tuple(
        Layout("wikitext-2", tuple(map(File, names, _DIGESTS)))
        for names in (
            ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
            ("train.txt", "valid.txt", "test.txt"),
        )
    ),
    archives=(
        Archive(
            name="wikitext-2-v1.zip",
            # As the Hugging Face datasets library lists it.
            sha256="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
            size=4_475_746,
            addresses=(
                # The official address, which has not answered for years.
                "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",
                # The first author's.
                "https://wikitext.smerity.com/wikitext-2-v1.zip",
            ),
        ),
    ),
)
