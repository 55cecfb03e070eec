#include "model/model_folder.h"

#include <algorithm>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "model/spec_text.h"

namespace nanoflow {
namespace {

constexpr const char* kFormat = "nanoflow-model 1";
constexpr size_t kChunkBytes = size_t{32} << 20;  // read at a time, in whole rows

/// A tensor in weights.bin.
struct StoredTensor {
  std::string name;
  DType dtype;
  size_t offset;
  std::vector<int64_t> shape;

  size_t row_bytes() const {
    size_t bytes = size_of(dtype);
    for (size_t dim = 1; dim < shape.size(); ++dim) bytes *= static_cast<size_t>(shape[dim]);
    return bytes;
  }
};

struct ModelFile {
  ModelSpec spec;
  std::vector<StoredTensor> tensors;
};

StoredTensor parse_tensor(const std::string& text) {
  std::istringstream words(text);
  StoredTensor tensor;
  std::string dtype;
  words >> tensor.name >> dtype >> tensor.offset;
  NF_CHECK(!words.fail(), "'", text, "' is not a name, a dtype and a byte");
  tensor.dtype = parse_dtype(dtype);
  for (int64_t extent; words >> extent;) tensor.shape.push_back(extent);
  const bool is_shape = !tensor.shape.empty() && *std::ranges::min_element(tensor.shape) > 0;
  NF_CHECK(words.eof() && is_shape, "'", text, "' does not end with a shape");
  return tensor;
}

ModelFile read_model_file(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / kModelFile;
  std::ifstream in(path);
  NF_CHECK(in.is_open(), "there is no ", path.string(),
           "; `nanoflow export-spec MODEL FOLDER` writes one");
  std::string line;
  std::getline(in, line);
  NF_CHECK(line == kFormat, path.string(), " begins with '", line, "', not with '", kFormat, "'");
  ModelFile file;
  SpecReader reader;
  int number = 1;
  try {
    while (std::getline(in, line)) {
      ++number;
      const size_t space = std::min(line.find(' '), line.size());
      const std::string word = line.substr(0, space);
      const std::string rest = line.substr(std::min(space + 1, line.size()));
      if (word == "tensor") {
        file.tensors.push_back(parse_tensor(rest));
      } else {
        reader.read(word, rest);
      }
    }
    file.spec = reader.finish();
  } catch (const Error& error) {
    fail(path.string(), ", line ", number, ": ", error.what());
  }
  return file;
}

/// Gives the rows of a tensor to the weights, some at a time.
void load_tensor(Weights& weights, const StoredTensor& tensor, std::ifstream& in,
                 std::vector<char>& buffer) {
  const size_t row_bytes = tensor.row_bytes();
  const auto step = static_cast<int64_t>(std::max<size_t>(1, kChunkBytes / row_bytes));
  in.seekg(static_cast<std::streamoff>(tensor.offset));
  for (int64_t row = 0; row < tensor.shape[0]; row += step) {
    const auto rows = static_cast<size_t>(std::min(step, tensor.shape[0] - row));
    buffer.resize(rows * row_bytes);
    in.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    NF_CHECK(in.good(), "the file ends inside of tensor ", tensor.name);
    weights.load(tensor.name, row, buffer.data(), buffer.size(), tensor.dtype);
  }
}

void write_file(const std::filesystem::path& path, std::ios::openmode mode,
                const std::function<void(std::ofstream&)>& write) {
  std::ofstream out(path, mode | std::ios::trunc);
  if (out.is_open()) write(out);
  out.close();
  NF_CHECK(out.good(), "cannot write ", path.string());
}

}  // namespace

void write_model(const Weights& weights, const std::filesystem::path& folder) {
  NF_CHECK(weights.backend()->device().kind == Device::Kind::kCpu,
           "only weights in host memory can be written, not those of ",
           weights.backend()->device());
  NF_CHECK(weights.spec().ranks == 1, "only the weights of a rank alone can be written, not those ",
           "of rank ", weights.spec().rank, " of ", weights.spec().ranks);
  std::error_code problem;
  std::filesystem::create_directories(folder, problem);
  NF_CHECK(!problem, "cannot make the folder ", folder.string(), ": ", problem.message());
  std::filesystem::remove(folder / kModelFile, problem);
  std::ostringstream lines;
  lines << kFormat << "\n" << to_text(weights.spec());
  write_file(folder / kWeightsFile, std::ios::binary, [&](std::ofstream& out) {
    size_t offset = 0;
    for (size_t i = 0; i < weights.entries().size(); ++i) {
      const Arena::Entry& entry = weights.entries()[i];
      const Tensor tensor = weights.tensor(static_cast<int>(i));
      lines << "tensor " << entry.name << " " << entry.dtype << " " << offset;
      for (int64_t extent : entry.shape) lines << " " << extent;
      lines << "\n";
      out.write(tensor.data<char>(), static_cast<std::streamsize>(tensor.span_bytes()));
      offset += tensor.span_bytes();
    }
  });
  write_file(folder / kModelFile, std::ios::out, [&](std::ofstream& out) { out << lines.str(); });
}

ModelSpec read_spec(const std::filesystem::path& folder) { return read_model_file(folder).spec; }

std::shared_ptr<Weights> read_weights(const std::filesystem::path& folder,
                                      std::shared_ptr<Backend> backend) {
  const ModelFile file = read_model_file(folder);
  const std::filesystem::path path = folder / kWeightsFile;
  std::ifstream in(path, std::ios::binary);
  NF_CHECK(in.is_open(), "there is no ", path.string());
  auto weights = std::make_shared<Weights>(file.spec, std::move(backend));
  std::vector<char> buffer;
  try {
    for (const StoredTensor& tensor : file.tensors) load_tensor(*weights, tensor, in, buffer);
    weights->finish();
  } catch (const OutOfMemory&) {
    throw;
  } catch (const Error& error) {
    fail(path.string(), ": ", error.what());
  }
  return weights;
}

}  // namespace nanoflow
