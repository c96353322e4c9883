// JSON as RFC 8259 has it, read into one flat list: no more memory than a dozen times the
// text, whatever it says. Objects with a name twice are refused, as are numbers that are
// none, strings that are no UTF-8 and anything nested deeper than any description.
#ifndef XNOR_JSON_H_
#define XNOR_JSON_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace xnor::json {

enum class Kind : uint8_t { kNull, kBool, kInteger, kReal, kString, kList, kObject };

// The entries of a list or an object follow it; `end` is where the next one begins.
struct Entry {
  Kind kind;
  uint32_t count;  // of entries, or of bytes of a string
  uint32_t end;
  union {
    bool truth;
    int64_t integer;
    double real;
    uint32_t text;
  };
};

class Document;

class Value {
 public:
  Value(const Document* document, uint32_t at) : document_(document), at_(at) {}

  Kind kind() const;
  bool is(Kind kind) const { return this->kind() == kind; }
  bool truth() const;
  int64_t integer() const;
  double real() const;  // of an integer too
  std::string_view string() const;
  uint32_t count() const;  // of a list's or an object's entries
  // A list's entries, or an object's names and values in turn.
  std::vector<Value> entries() const;
  // An object's value; null where it has none.
  Value operator[](std::string_view name) const;

 private:
  const Entry& entry() const;
  const Document* document_;
  uint32_t at_;
};

class Document {
 public:
  // Refuses what is no JSON; `what` names it.
  Document(std::string_view text, const char* what);
  Value root() const { return {this, 0}; }

 private:
  friend class Value;
  friend class Parser;
  std::vector<Entry> entries_;
  std::string text_;  // all strings, without their escapes
};

}  // namespace xnor::json

#endif  // XNOR_JSON_H_
