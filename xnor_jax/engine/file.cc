// Reads a packed network's file: safetensors with a description in its metadata, as
// packing/file.py writes it. The description is read first, field by field and node by
// node, and determines the arrays and their sizes; then exactly these arrays are read.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <string_view>

#include "model.h"

namespace xnor {
namespace {

constexpr const char* kFormat = "xnor_jax packed network";
constexpr const char* kLayout =
    "bit 1 is -1; least significant bit first; C order of [*window, in, out]";
constexpr int64_t kVersion = 3;

// An array of the file; its bytes are [begin, end) of the data.
struct Stored {
  std::string dtype;
  Sizes shape;
  int64_t begin, end;
};

using Stores = std::map<std::string, Stored, std::less<>>;

void RequireObject(const json::Value& value, const char* what,
                   const std::set<std::string_view>& names) {
  Require(value.is(json::Kind::kObject), std::string(what) + ": expected an object");
  const std::vector<json::Value> entries = value.entries();
  for (size_t i = 0; i < entries.size(); i += 2)
    Require(names.count(entries[i].string()) > 0, std::string(what) + ": unknown entry");
}

int64_t BytesOf(const std::string& dtype) {
  return dtype == "F32" || dtype == "I32" ? 4 : dtype == "I16" ? 2 : dtype == "U8" ? 1 : 0;
}

// Reads the header's arrays, which must be contiguous and cover all of the data.
Stores ReadStores(const json::Value& header, int64_t size) {
  Stores stores;
  std::vector<const Stored*> sorted;
  const std::vector<json::Value> entries = header.entries();
  for (size_t i = 0; i < entries.size(); i += 2) {
    const std::string name(entries[i].string());
    if (name == "__metadata__") continue;
    const json::Value found = entries[i + 1];
    RequireObject(found, "an array", {"dtype", "shape", "data_offsets"});
    Stored stored;
    stored.dtype = ReadString(found["dtype"], "dtype");
    const json::Value shape = found["shape"], offsets = found["data_offsets"];
    Require(shape.is(json::Kind::kList) && shape.count() <= kMostAxes &&
                offsets.is(json::Kind::kList) && offsets.count() == 2,
            "expected a shape and two offsets for each array");
    for (const json::Value& n : shape.entries())
      stored.shape.push_back(ReadInteger(n, "shape", 0, kLargestFile));
    const std::vector<json::Value> ends = offsets.entries();
    stored.begin = ReadInteger(ends[0], "data_offsets", 0, size);
    stored.end = ReadInteger(ends[1], "data_offsets", stored.begin, size);
    const int64_t each = BytesOf(stored.dtype);
    Require(each > 0, "an array has an unsupported dtype");
    Require(Times(Product(stored.shape), each) == stored.end - stored.begin,
            "an array's offsets do not match its shape");
    sorted.push_back(&stores.emplace(name, std::move(stored)).first->second);
  }
  std::sort(sorted.begin(), sorted.end(), [](const Stored* a, const Stored* b) {
    return std::pair(a->begin, a->end) < std::pair(b->begin, b->end);
  });
  int64_t end = 0;
  for (const Stored* stored : sorted) {
    Require(stored->begin == end, "expected contiguous arrays");
    end = stored->end;
  }
  Require(end == size, "expected a complete file, with nothing after its arrays");
  return stores;
}

std::vector<float> ReadReals(const json::Value& found, const char* name, double least) {
  Require(found.is(json::Kind::kList) && found.count() >= 1 && found.count() <= 4096,
          std::string(name) + ": expected a list of numbers, one per channel");
  std::vector<float> numbers;
  for (const json::Value& entry : found.entries()) {
    const double number = ReadReal(entry, name);
    Require(number >= least && number <= 1e6,
            std::string(name) + ": a number is out of range");
    numbers.push_back(static_cast<float>(number));
  }
  return numbers;
}

// Reads the metadata: name, dataset, test accuracy, classes and preprocessing.
void ReadInfo(const json::Value& found, Model& model) {
  const auto given = [&](const char* name) {
    return !found[name].is(json::Kind::kNull);
  };
  if (given("name")) model.name = ReadString(found["name"], "name");
  if (given("dataset")) model.dataset = ReadString(found["dataset"], "dataset");
  if (given("test_accuracy")) {
    model.test_accuracy = ReadReal(found["test_accuracy"], "test_accuracy");
    Require(model.test_accuracy >= 0 && model.test_accuracy <= 1,
            "test_accuracy: expected a number from 0 to 1");
  }
  if (given("class_names")) {
    const json::Value names = found["class_names"];
    Require(names.is(json::Kind::kList) && names.count() <= kMostClasses,
            "class_names: expected a list of names");
    for (const json::Value& name : names.entries())
      model.class_names.push_back(ReadString(name, "class_names"));
  }
  if (!given("preprocessing")) return;
  const json::Value pixels = found["preprocessing"];
  RequireObject(pixels, "preprocessing", {"mean", "std", "resize"});
  auto read = std::make_unique<Preprocessing>();
  read->mean = ReadReals(pixels["mean"], "mean", -1e6);
  read->std = ReadReals(pixels["std"], "std", 1e-6);
  const Sizes& shape = model.image_shape;
  const size_t channels = static_cast<size_t>(shape.back());
  Require(read->mean.size() == channels && read->std.size() == channels,
          "preprocessing: expected a mean and a std for each channel");
  if (!pixels["resize"].is(json::Kind::kNull)) {
    read->resize = ReadInteger(pixels["resize"], "resize", 1, 1 << 16);
    Require(shape.size() == 3 && shape[0] == shape[1] && read->resize >= shape[0],
            "preprocessing: expected square images, no larger than resize");
  }
  for (size_t c = 0; c < channels; ++c)
    for (int value = 0; value < 256; ++value)
      model.pixel_values.push_back(
          (static_cast<float>(value) / 255.0f - read->mean[c]) / read->std[c]);
  model.preprocessing = std::move(read);
}

// CRC-32 as in zlib, PNG and zip, four bytes at a time; continues from `sum`.
uint32_t Crc32(const uint8_t* data, size_t size, uint32_t sum = 0) {
  static const std::vector<uint32_t> tables = [] {
    std::vector<uint32_t> t(4 * 256);
    for (uint32_t i = 0; i < 256; ++i) {
      t[i] = i;
      for (int bit = 0; bit < 8; ++bit) t[i] = t[i] >> 1 ^ (t[i] & 1 ? 0xedb88320u : 0);
    }
    for (int i = 256; i < 4 * 256; ++i) t[i] = t[i - 256] >> 8 ^ t[t[i - 256] & 255];
    return t;
  }();
  const uint32_t* const t = tables.data();
  sum = ~sum;
  for (; size >= 4; size -= 4, data += 4) {
    sum ^= data[0] | data[1] << 8 | data[2] << 16 | static_cast<uint32_t>(data[3]) << 24;
    sum = t[3 * 256 + (sum & 255)] ^ t[2 * 256 + (sum >> 8 & 255)] ^
          t[256 + (sum >> 16 & 255)] ^ t[sum >> 24];
  }
  for (; size > 0; --size, ++data) sum = sum >> 8 ^ t[(sum ^ *data) & 255];
  return ~sum;
}

// The CRC-32 of the description's text, then the data section: 8 lower-case hex digits.
std::string Checksum(std::string_view text, const uint8_t* section, size_t size) {
  const uint32_t first =
      Crc32(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  char digits[9];
  std::snprintf(digits, sizeof(digits), "%08x", Crc32(section, size, first));
  return digits;
}

void CheckVersion(const json::Value& found) {
  const json::Value format = found["format"];
  Require(format.is(json::Kind::kString) && format.string() == kFormat,
          "expected a packed network of xnor_jax, got another format");
  const int64_t version = ReadInteger(found["version"], "version", 1);
  const std::string is = "the file is of version " + std::to_string(version);
  Require(version <= kVersion, is + ", this library reads version " +
                                   std::to_string(kVersion) + "; update it");
  Require(version == kVersion,
          is + ", which this library no longer reads; pack the network again");
}

// Returns the nodes of a file's description; stores the rest in the model.
Described ReadDescription(const json::Value& found, Model& model) {
  RequireObject(found, "the description",
                {"format", "version", "layout", "image_shape", "nodes", "name", "dataset",
                 "preprocessing", "class_names", "test_accuracy"});
  Require(ReadString(found["layout"], "layout") == kLayout,
          "layout: unsupported bit order");
  model.image_shape = ReadIntegers(found["image_shape"], "image_shape", 1);
  Require(model.image_shape.size() >= 1 && model.image_shape.size() <= 4,
          "image_shape: expected 1 to 4 sizes");
  Described described = Describe(model.image_shape, found["nodes"]);
  Require(described.memory() <=
              std::min(2 * described.stored() + kLargestPacked, kLargestNetwork),
          "the network needs too much memory for its file's size");
  model.output_shape = described.specs.back().shape;
  ReadInfo(found, model);
  Require(model.class_names.empty() ||
              model.class_names.size() == static_cast<size_t>(model.output_shape.back()),
          "class_names: expected a name for each class");
  for (const std::unique_ptr<Node>& node : described.nodes) {
    model.kinds.push_back(node->kind);
    model.names.push_back(node->name);
  }
  return described;
}

// Whether a code point is printable: no control or format character (such as bidirectional
// marks), no space but U+0020, no surrogate, private-use character or noncharacter.
bool Printable(uint32_t c) {
  constexpr std::pair<uint32_t, uint32_t> kOther[] = {
      {0, 0x1f}, {0x7f, 0xa0}, {0xad, 0xad}, {0x600, 0x605},
      {0x61c, 0x61c}, {0x6dd, 0x6dd}, {0x70f, 0x70f}, {0x890, 0x891},
      {0x8e2, 0x8e2}, {0x1680, 0x1680}, {0x180e, 0x180e}, {0x2000, 0x200f},
      {0x2028, 0x202f}, {0x205f, 0x206f}, {0x3000, 0x3000}, {0xd800, 0xf8ff},
      {0xfdd0, 0xfdef}, {0xfeff, 0xfeff}, {0xfff0, 0xfffb}, {0x110bd, 0x110bd},
      {0x110cd, 0x110cd}, {0x13430, 0x1343f}, {0x1bca0, 0x1bca3}, {0x1d173, 0x1d17a},
      {0xe0000, 0xe00ff}, {0xe01f0, 0x10ffff}};
  if ((c & 0xfffe) == 0xfffe) return false;
  for (const auto& [first, last] : kOther)
    if (c >= first && c <= last) return false;
  return true;
}

}  // namespace

int64_t ReadInteger(const json::Value& found, const char* name, int64_t least,
                    int64_t largest) {
  Require(found.is(json::Kind::kInteger) && found.integer() >= least &&
              found.integer() <= largest,
          std::string(name) + ": expected a whole number from " + std::to_string(least) +
              " to " + std::to_string(largest));
  return found.integer();
}

Sizes ReadIntegers(const json::Value& found, const char* name, int64_t least) {
  Require(found.is(json::Kind::kList) && found.count() <= kMostAxes,
          std::string(name) + ": expected a list of whole numbers");
  Sizes sizes;
  for (const json::Value& entry : found.entries())
    sizes.push_back(ReadInteger(entry, name, least));
  return sizes;
}

double ReadReal(const json::Value& found, const char* name) {
  Require((found.is(json::Kind::kInteger) || found.is(json::Kind::kReal)) &&
              std::fabs(found.real()) < 1e30,
          std::string(name) + ": expected a finite number");
  return found.real();
}

std::string ReadString(const json::Value& found, const char* name) {
  Require(found.is(json::Kind::kString), std::string(name) + ": expected a string");
  const std::string_view text = found.string();
  size_t characters = 0;
  for (size_t i = 0; i < text.size(); ++characters) {
    const auto byte = [&](size_t at) { return static_cast<unsigned char>(text[at]); };
    const int more = byte(i) < 0x80 ? 0 : byte(i) < 0xe0 ? 1 : byte(i) < 0xf0 ? 2 : 3;
    uint32_t code = more == 0 ? byte(i) : byte(i) & (0x3fu >> more);
    for (int k = 1; k <= more; ++k) code = code << 6 | (byte(i + k) & 0x3fu);
    Require(Printable(code), std::string(name) + ": expected printable characters");
    i += more + 1;
  }
  Require(characters <= kLongestString,
          std::string(name) + ": expected a string of at most 200 characters");
  return std::string(text);
}

std::unique_ptr<Model> ReadModel(const uint8_t* data, size_t size) {
  Require(size <= static_cast<size_t>(kLargestFile), "expected a file of at most 1 GiB");
  uint64_t length = 0;
  for (int i = 0; size >= 8 && i < 8; ++i) length |= static_cast<uint64_t>(data[i]) << 8 * i;
  Require(size >= 8 && length >= 2 && length <= size - 8 &&
              length <= static_cast<uint64_t>(kLargestHeader),
          "expected a safetensors file with a header of at most 1 MiB");
  auto model = std::make_unique<Model>();
  const uint8_t* const arrays = data + 8 + length;
  const size_t section = size - 8 - static_cast<size_t>(length);
  Stores stores;
  std::string text, sum;
  {
    const std::string_view header(reinterpret_cast<const char*>(data) + 8, length);
    const json::Document document(header, "the header");
    const json::Value metadata = document.root()["__metadata__"];
    Require(metadata.is(json::Kind::kObject) &&
                metadata["xnor_jax"].is(json::Kind::kString),
            "expected a packed network of xnor_jax, got another file");
    RequireObject(metadata, "the metadata", {"xnor_jax", "crc32"});
    text = metadata["xnor_jax"].string();
    if (metadata["crc32"].is(json::Kind::kString)) sum = metadata["crc32"].string();
    stores = ReadStores(document.root(), static_cast<int64_t>(section));
  }
  const Described described = [&] {
    const json::Document document(text, "the description");
    const json::Value found = document.root();
    Require(found.is(json::Kind::kObject), "expected the description to be a JSON object");
    CheckVersion(found);
    Require(sum == Checksum(text, arrays, section),
            "the file is damaged: its checksum does not match; copy or pack it again");
    return ReadDescription(found, *model);
  }();
  text = std::string();

  // Checks all arrays before laying out any.
  std::vector<std::vector<std::pair<Member, const uint8_t*>>> taken;
  size_t count = 0;
  for (size_t i = 0; i < described.nodes.size(); ++i) {
    taken.emplace_back();
    for (const Member& member : described.members[i]) {
      const std::string name = std::to_string(i) + "." + member.name;
      const auto found = stores.find(name);
      Require(found != stores.end(), "expected an array " + name);
      Require(found->second.dtype == member.stored_dtype() &&
                  found->second.shape == member.stored_shape(),
              name + ": the array has the wrong dtype or shape");
      taken.back().push_back({member, arrays + found->second.begin});
      ++count;
    }
  }
  Require(count == stores.size(), "unexpected arrays: no node uses them");

  // Together with the file, at most three times its size plus a constant.
  constexpr int64_t kAlways = int64_t{48} << 20;
  model->graph = std::make_unique<Graph>(
      model->image_shape, std::min(2 * described.stored() + kAlways, kLargestNetwork));
  Build(described, *model->graph, [&](size_t node) {
    return std::make_unique<StoredArrays>(*model->graph, std::move(taken[node]));
  });
  return model;
}

}  // namespace xnor
