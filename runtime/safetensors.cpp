#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "check.h"
#include "json_file.h"

namespace frspec {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little,
              "tensors are used where they lie in the file, which is little-endian");

namespace {

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own reader
constexpr size_t kMaxRank = 16;

struct FormatDType {
  std::string_view name;
  uint64_t bits;
  std::optional<DType> dtype;
};

// Every element type of the format; those without a DType may be present, but not be asked for.
constexpr std::array<FormatDType, 23> kFormatDTypes = {{
    {"F32", 32, DType::kF32},
    {"F16", 16, DType::kF16},
    {"BF16", 16, DType::kBF16},
    {"I32", 32, DType::kI32},
    {"I64", 64, DType::kI64},
    {"BOOL", 8, {}},
    {"U8", 8, {}},
    {"I8", 8, {}},
    {"I16", 16, {}},
    {"U16", 16, {}},
    {"U32", 32, {}},
    {"U64", 64, {}},
    {"F64", 64, {}},
    {"C64", 64, {}},
    {"F8_E4M3", 8, {}},
    {"F8_E5M2", 8, {}},
    {"F8_E8M0", 8, {}},
    {"F8_E4M3FNUZ", 8, {}},
    {"F8_E5M2FNUZ", 8, {}},
    {"F6_E2M3", 6, {}},
    {"F6_E3M2", 6, {}},
    {"F4", 4, {}},
    {"F4_E2M1", 4, {}},
}};

const FormatDType* find_format_dtype(std::string_view name) {
  for (const FormatDType& entry : kFormatDTypes) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

// The member `key` of a tensor's header entry.
const json& member(const json& entry, const char* key, const std::string& where) {
  const auto found = entry.find(key);
  FRSPEC_CHECK(found != entry.end(), ModelError, where, ": expected the key \"", key,
               "\", found none");
  return *found;
}

// A number of elements or bytes: an integer in [0, 2^63).
uint64_t count(const json& value, const char* what, const std::string& where) {
  FRSPEC_CHECK(value.is_number_unsigned() && value.get<uint64_t>() <= INT64_MAX, ModelError, where,
               ": expected ", what, " of integers in [0, 2^63), found ", describe(value));
  return value.get<uint64_t>();
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path) {
  // O_NONBLOCK: opening a FIFO must fail the check below, not wait for a writer.
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  FRSPEC_CHECK(file.get() >= 0, ModelError, path,
               ": expected a safetensors file, cannot open it: ", std::strerror(errno));
  struct stat status = {};
  FRSPEC_CHECK(fstat(file.get(), &status) == 0, ModelError, path,
               ": cannot be examined: ", std::strerror(errno));
  FRSPEC_CHECK(S_ISREG(status.st_mode), ModelError, path,
               ": expected a regular file, found something else");
  size_ = static_cast<size_t>(status.st_size);
  FRSPEC_CHECK(size_ > kLengthBytes, ModelError, path,
               ": expected a safetensors file of more than ", kLengthBytes, " bytes, found ",
               size_);
  void* base = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  FRSPEC_CHECK(base != MAP_FAILED, ModelError, path, ": cannot map ", size_,
               " bytes: ", std::strerror(errno));
  base_ = static_cast<const unsigned char*>(base);
  // Weights are read once, front to back. Advice: that it failed would change nothing.
  madvise(base, size_, MADV_SEQUENTIAL);
  try {
    parse_header();
  } catch (...) {
    unmap();
    throw;
  }
}

SafetensorsFile::~SafetensorsFile() { unmap(); }

void SafetensorsFile::unmap() noexcept {
  if (base_ != nullptr) munmap(const_cast<unsigned char*>(base_), size_);
  base_ = nullptr;
}

void SafetensorsFile::parse_header() {
  uint64_t length = 0;
  std::memcpy(&length, base_, kLengthBytes);
  FRSPEC_CHECK(length <= kMaxHeaderBytes, ModelError, path_, ": expected a header of at most ",
               kMaxHeaderBytes, " bytes, found ", length, " (not a safetensors file?)");
  FRSPEC_CHECK(length <= size_ - kLengthBytes, ModelError, path_, ": expected a header of ", length,
               " bytes, found only ", size_ - kLengthBytes, " in the file (truncated?)");
  const std::string_view text(reinterpret_cast<const char*>(base_) + kLengthBytes, length);
  FRSPEC_CHECK(!text.empty() && text.front() == '{', ModelError, path_,
               ": expected a header that begins with '{', found something else");
  const json header = parse_json(text, path_ + " (header)");

  const uint64_t data_begin = kLengthBytes + length;
  const uint64_t data_bytes = size_ - data_begin;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      FRSPEC_CHECK(value.is_object(), ModelError, path_,
                   ": __metadata__: expected an object, found ", describe(value));
      for (const auto& [key, text_value] : value.items()) {
        FRSPEC_CHECK(text_value.is_string(), ModelError, path_, ": __metadata__ ", quote(key),
                     ": expected a string, found ", describe(text_value));
        metadata_[key] = text_value.get<std::string>();
      }
      continue;
    }
    const std::string where = concat(path_, ": tensor ", quote(name));
    FRSPEC_CHECK(value.is_object(), ModelError, where, ": expected an object, found ",
                 describe(value));
    Entry entry;
    const json& dtype = member(value, "dtype", where);
    FRSPEC_CHECK(dtype.is_string(), ModelError, where, ": expected a dtype name, found ",
                 describe(dtype));
    entry.format_dtype = dtype.get<std::string>();
    const FormatDType* format_dtype = find_format_dtype(entry.format_dtype);
    FRSPEC_CHECK(format_dtype != nullptr, ModelError, where,
                 ": expected a dtype of the format, found ", quote(entry.format_dtype));

    const json& shape = member(value, "shape", where);
    FRSPEC_CHECK(shape.is_array() && shape.size() <= kMaxRank, ModelError, where,
                 ": expected a shape of at most ", kMaxRank, " dimensions, found ",
                 shape.is_array() ? concat(shape.size()) : describe(shape));
    uint64_t bits = format_dtype->bits;
    bool overflow = false;
    for (const json& dimension : shape) {
      const uint64_t extent = count(dimension, "a shape", where);
      entry.shape.push_back(static_cast<int64_t>(extent));
      overflow |= __builtin_mul_overflow(bits, extent, &bits);
    }
    FRSPEC_CHECK(!overflow, ModelError, where, ": shape ", shape_text(entry.shape),
                 ": expected a size below 2^61 bytes, found more");
    FRSPEC_CHECK(bits % 8 == 0, ModelError, where, ": shape ", shape_text(entry.shape), " of ",
                 entry.format_dtype, ": expected whole bytes, found ", bits, " bits");

    const json& offsets = member(value, "data_offsets", where);
    FRSPEC_CHECK(offsets.is_array() && offsets.size() == 2, ModelError, where,
                 ": expected data_offsets [begin, end], found ",
                 offsets.is_array() ? concat(offsets.size(), " numbers") : describe(offsets));
    const uint64_t begin = count(offsets[0], "data_offsets", where);
    const uint64_t end = count(offsets[1], "data_offsets", where);
    FRSPEC_CHECK(begin <= end, ModelError, where, ": expected data_offsets in order, found [",
                 begin, ", ", end, "]");
    FRSPEC_CHECK(end <= data_bytes, ModelError, where, ": data_offsets [", begin, ", ", end,
                 "]: expected an end within ", data_bytes,
                 " bytes of data, found one outside the file (truncated?)");
    FRSPEC_CHECK(end - begin == bits / 8, ModelError, where, ": expected ", bits / 8, " bytes for ",
                 entry.format_dtype, " ", shape_text(entry.shape), ", found data_offsets of ",
                 end - begin);
    entry.begin = data_begin + begin;
    entry.end = data_begin + end;
    entries_.emplace(name, std::move(entry));
  }
  check_tiling(data_begin);
}

void SafetensorsFile::check_tiling(uint64_t data_begin) const {
  std::vector<const std::pair<const std::string, Entry>*> order;
  for (const auto& item : entries_) order.push_back(&item);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t expected = data_begin;
  for (const auto* item : order) {
    FRSPEC_CHECK(item->second.begin == expected, ModelError, path_, ": tensor ", quote(item->first),
                 ": expected data_offsets that begin at ", expected - data_begin,
                 ", where the tensor before ends, found ", item->second.begin - data_begin,
                 item->second.begin < expected ? " (an overlap)" : " (a hole)");
    expected = item->second.end;
  }
  FRSPEC_CHECK(expected == size_, ModelError, path_, ": expected the data to end at ",
               expected - data_begin, " with the last tensor, found ", size_ - data_begin,
               " bytes of data");
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  names.reserve(entries_.size());
  for (const auto& item : entries_) names.push_back(item.first);
  return names;
}

bool SafetensorsFile::contains(const std::string& name) const { return entries_.count(name) != 0; }

HostTensor SafetensorsFile::tensor(const std::string& name) const {
  const std::string where = concat(path_, ": tensor ", quote(name));
  const auto found = entries_.find(name);
  FRSPEC_CHECK(found != entries_.end(), ModelError, where, ": expected it in the file, found none");
  const Entry& entry = found->second;
  const std::optional<DType> dtype = find_format_dtype(entry.format_dtype)->dtype;
  FRSPEC_CHECK(dtype.has_value(), ModelError, where,
               ": expected dtype F32, F16, BF16, I32 or I64, found ", entry.format_dtype);
  FRSPEC_CHECK(entry.begin % dtype_size(*dtype) == 0, ModelError, where,
               ": expected data aligned to ", dtype_size(*dtype), " bytes, found it at byte ",
               entry.begin, " of the file; save it again with a current safetensors writer");
  return {.name = name,
          .dtype = *dtype,
          .shape = entry.shape,
          .data = base_ + entry.begin,
          .bytes = static_cast<size_t>(entry.end - entry.begin),
          .file = this};
}

void SafetensorsFile::release(const HostTensor& tensor, size_t bytes) const {
  if (tensor.file != this) return;
  // A page that is touched brings what lies around it into memory, up to a huge page: beyond the
  // tensor that would stay.
  constexpr size_t kAround = size_t{2} << 20;
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(tensor.data) - base_);
  const size_t begin = offset / kAround * kAround;
  const size_t tensor_end = offset + std::min(bytes, tensor.bytes);
  const size_t end = std::min((tensor_end + kAround - 1) / kAround * kAround, size_);
  if (begin >= end) return;
  madvise(const_cast<unsigned char*>(base_) + begin, end - begin, MADV_DONTNEED);
}

}  // namespace frspec
