"""Functions, files and folders stay small; `make sizes` prints the table."""

from tests.support.places import ROOT
from tests.support.sizes import braced_functions, functions, too_long


def test_no_function_file_or_folder_passes_its_limit() -> None:
    assert too_long() == []


def test_functions_of_cpp_are_found_by_their_braces() -> None:
    text = """
namespace npr {
// void no() { }
template <class T>
T twice(T value) {
  if (value) {
    return value + value;  // "}"
  }
  return '{';
}
struct Pair {
  Pair(int a) : first{a}, second(a) {
    use();
  }
  int size() const { return 2; }
};
constexpr int kSizes[] = {1, 2};
}  // namespace npr
"""
    assert [(last - first + 1, name) for first, last, name in braced_functions(text)] == [
        (7, "twice"),
        (3, "Pair"),
        (1, "size"),
    ]


def test_a_function_counts_with_its_decorators() -> None:
    """`places.py` has no function; the first of `test_readmes.py` with a decorator begins at it."""
    folder = ROOT / "tests" / "unit" / "repository"
    assert list(functions(ROOT / "tests" / "support" / "places.py")) == []
    (counted,) = [
        each for each in functions(folder / "test_readmes.py") if "test_links_resolve" in each.place
    ]
    assert counted.lines == 3
