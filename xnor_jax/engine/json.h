// A parser of JSON (RFC 8259) into one flat list, whose memory is at most about a dozen
// times the text's. It rejects objects with duplicate names, malformed numbers, strings
// that are not UTF-8, and nesting deeper than in any description.
#ifndef XNOR_JSON_H_
#define XNOR_JSON_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace xnor::json {

enum class Kind : uint8_t { kNull, kBool, kInteger, kReal, kString, kList, kObject };

// The entries of a list or an object follow it; `end` is the index after the last of them.
struct Entry {
  Kind kind;
  uint32_t count;  // entries, or bytes of a string
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
  double real() const;  // also of an integer
  std::string_view string() const;
  uint32_t count() const;  // entries of a list or an object
  // A list's entries, or an object's names and values, alternating.
  std::vector<Value> entries() const;
  // The value of an object's entry; null if there is none.
  Value operator[](std::string_view name) const;

 private:
  const Entry& entry() const;
  const Document* document_;
  uint32_t at_;
};

class Document {
 public:
  // Throws a Refusal if the text is not valid JSON; `what` names it in the message.
  Document(std::string_view text, const char* what);
  Value root() const { return {this, 0}; }

 private:
  friend class Value;
  friend class Parser;
  std::vector<Entry> entries_;
  std::string text_;  // all strings, unescaped
};

}  // namespace xnor::json

#endif  // XNOR_JSON_H_
