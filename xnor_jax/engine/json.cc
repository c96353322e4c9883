#include "json.h"

#include <locale.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "check.h"

namespace xnor::json {
namespace {

// `strtod` in the C locale, whatever the process's own: others have a decimal comma.
double Real(const char* text) {
  static const locale_t c = newlocale(LC_ALL_MASK, "C", nullptr);
  if (c == nullptr) throw std::bad_alloc();
  const locale_t before = uselocale(c);
  const double number = std::strtod(text, nullptr);
  uselocale(before);
  return number;
}

}  // namespace

class Parser {
 public:
  Parser(Document& document, std::string_view text) : to_(document), rest_(text) {
    // Every entry takes at least two bytes of text, except for the last number.
    to_.entries_.reserve(text.size() / 2 + 2);
    to_.text_.reserve(text.size());
  }

  bool Parse() {
    if (!Any(0)) return false;
    Space();
    return rest_.empty();
  }

 private:
  static constexpr int kDeepest = 32;

  void Space() {
    while (!rest_.empty() && std::strchr(" \t\n\r", rest_[0]) && rest_[0] != 0)
      rest_.remove_prefix(1);
  }
  bool Take(std::string_view word) {
    if (rest_.substr(0, word.size()) != word) return false;
    rest_.remove_prefix(word.size());
    return true;
  }
  // Skips white space, then takes `c`.
  bool Next(char c) {
    Space();
    return Take({&c, 1});
  }
  uint32_t Begin(Kind kind) {
    to_.entries_.push_back({kind, 0, 0, {}});
    return static_cast<uint32_t>(to_.entries_.size() - 1);
  }
  bool End(uint32_t at) {
    to_.entries_[at].end = static_cast<uint32_t>(to_.entries_.size());
    return true;
  }

  bool Any(int depth) {
    Space();
    if (rest_.empty() || depth > kDeepest) return false;
    switch (rest_[0]) {
      case '{': return Object(depth);
      case '[': return List(depth);
      case '"': return String();
      case 'n': return Take("null") && End(Begin(Kind::kNull));
      case 't': return Take("true") && Bool(true);
      case 'f': return Take("false") && Bool(false);
      default: return Number();
    }
  }

  bool Bool(bool truth) {
    const uint32_t at = Begin(Kind::kBool);
    to_.entries_[at].truth = truth;
    return End(at);
  }

  bool List(int depth) {
    const uint32_t at = Begin(Kind::kList);
    Take("[");
    if (Next(']')) return End(at);
    do {
      if (!Any(depth + 1)) return false;
      ++to_.entries_[at].count;
    } while (Next(','));
    return Next(']') && End(at);
  }

  bool Object(int depth) {
    const uint32_t at = Begin(Kind::kObject);
    Take("{");
    if (Next('}')) return End(at);
    do {
      Space();
      if (!String() || !Next(':') || !Any(depth + 1)) return false;
      ++to_.entries_[at].count;
    } while (Next(','));
    return Next('}') && End(at) && Distinct(at);
  }

  bool Distinct(uint32_t at) {
    std::vector<std::string_view> names;
    names.reserve(to_.entries_[at].count);
    const std::vector<Value> found = Value(&to_, at).entries();
    for (size_t i = 0; i < found.size(); i += 2) names.push_back(found[i].string());
    std::sort(names.begin(), names.end());
    return std::adjacent_find(names.begin(), names.end()) == names.end();
  }

  bool Number() {
    const std::string_view begin = rest_;
    const auto digits = [&] {
      size_t n = 0;
      while (n < rest_.size() && rest_[n] >= '0' && rest_[n] <= '9') ++n;
      rest_.remove_prefix(n);
      return n > 0;
    };
    Take("-");
    if (!Take("0") && !digits()) return false;
    bool whole = true;
    if (Take(".")) {
      whole = false;
      if (!digits()) return false;
    }
    if (Take("e") || Take("E")) {
      whole = false;
      if (!Take("+")) Take("-");
      if (!digits()) return false;
    }
    const std::string number(begin.substr(0, begin.size() - rest_.size()));
    const uint32_t at = Begin(Kind::kReal);
    Entry& entry = to_.entries_[at];
    if (whole && number.size() <= 18) {  // 18 characters always fit into int64.
      entry.kind = Kind::kInteger;
      entry.integer = std::strtoll(number.c_str(), nullptr, 10);
    } else {
      entry.real = Real(number.c_str());
    }
    return End(at);
  }

  bool String() {
    const uint32_t at = Begin(Kind::kString);
    const size_t start = to_.text_.size();
    if (!Take("\"")) return false;
    for (;;) {
      if (rest_.empty() || static_cast<unsigned char>(rest_[0]) < 0x20) return false;
      if (Take("\"")) break;
      if (Take("\\") ? !Escape() : !Character()) return false;
    }
    to_.entries_[at].text = static_cast<uint32_t>(start);
    to_.entries_[at].count = static_cast<uint32_t>(to_.text_.size() - start);
    return End(at);
  }

  // One character of UTF-8; overlong encodings and surrogates are rejected.
  bool Character() {
    const auto byte = [&](size_t i) {
      return i < rest_.size() ? static_cast<unsigned char>(rest_[i]) : 0u;
    };
    const uint32_t first = byte(0);
    const int more = first < 0x80 ? 0 : first >> 5 == 6 ? 1 : first >> 4 == 14 ? 2
                     : first >> 3 == 30 ? 3 : -1;
    if (more < 0) return false;
    uint32_t code = more == 0 ? first : first & (0x3fu >> more);
    for (int i = 1; i <= more; ++i) {
      if (byte(i) >> 6 != 2) return false;
      code = code << 6 | (byte(i) & 0x3fu);
    }
    constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (code < kLeast[more] || code > 0x10ffff || code >> 11 == 0x1b) return false;
    to_.text_.append(rest_.substr(0, more + 1));
    rest_.remove_prefix(more + 1);
    return true;
  }

  bool Escape() {
    if (rest_.empty()) return false;
    const char c = rest_[0];
    rest_.remove_prefix(1);
    switch (c) {
      case '"': case '\\': case '/': to_.text_ += c; return true;
      case 'b': to_.text_ += '\b'; return true;
      case 'f': to_.text_ += '\f'; return true;
      case 'n': to_.text_ += '\n'; return true;
      case 'r': to_.text_ += '\r'; return true;
      case 't': to_.text_ += '\t'; return true;
      case 'u': break;
      default: return false;
    }
    uint32_t code, low;
    if (!Hex(code) || code >> 10 == 0x37) return false;
    if (code >> 10 == 0x36) {
      if (!Take("\\u") || !Hex(low) || low >> 10 != 0x37) return false;
      code = 0x10000 + ((code & 0x3ff) << 10 | (low & 0x3ff));
    }
    if (code < 0x80) {
      to_.text_ += static_cast<char>(code);
      return true;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    constexpr uint32_t kFirst[] = {0, 0xc0, 0xe0, 0xf0};
    to_.text_ += static_cast<char>(kFirst[more] | code >> (6 * more));
    for (int i = more - 1; i >= 0; --i)
      to_.text_ += static_cast<char>(0x80 | (code >> (6 * i) & 0x3f));
    return true;
  }

  bool Hex(uint32_t& code) {
    code = 0;
    if (rest_.size() < 4) return false;
    for (int i = 0; i < 4; ++i) {
      const char c = rest_[i];
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) return false;
      code = code << 4 | static_cast<uint32_t>(digit);
    }
    rest_.remove_prefix(4);
    return true;
  }

  Document& to_;
  std::string_view rest_;
};

Document::Document(std::string_view text, const char* what) {
  Require(text.size() < UINT32_MAX && Parser(*this, text).Parse(),
          std::string("expected ") + what + " to be JSON");
}

const Entry& Value::entry() const { return document_->entries_[at_]; }

Kind Value::kind() const { return entry().kind; }

bool Value::truth() const { return entry().truth; }

int64_t Value::integer() const { return entry().integer; }

double Value::real() const {
  return is(Kind::kInteger) ? static_cast<double>(entry().integer) : entry().real;
}

std::string_view Value::string() const {
  return std::string_view(document_->text_).substr(entry().text, entry().count);
}

uint32_t Value::count() const { return entry().count; }

std::vector<Value> Value::entries() const {
  std::vector<Value> found;
  found.reserve(is(Kind::kObject) ? 2 * count() : count());
  for (uint32_t at = at_ + 1; at < entry().end; at = document_->entries_[at].end)
    found.push_back({document_, at});
  return found;
}

Value Value::operator[](std::string_view name) const {
  static const Document kNone("null", "nothing");
  if (is(Kind::kObject)) {
    uint32_t at = at_ + 1;
    while (at < entry().end) {
      const uint32_t value = document_->entries_[at].end;
      if (Value(document_, at).string() == name) return {document_, value};
      at = document_->entries_[value].end;
    }
  }
  return kNone.root();
}

}  // namespace xnor::json
