// Usage: generate DEVICE MODEL_FOLDER STEPS PROMPT...
// Greedy tokens of all prompts, each a list of token ids such as 5,6,7: a line of ids for each.
// DEVICE is cpu or cuda.
#include <nanoflow/nanoflow.h>

#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

using Ids = std::vector<int32_t>;

struct Request {
  Ids tokens;         // the prompt, then what has been generated
  int computed = 0;   // tokens whose keys and values are in the cache
  int generated = 0;  // tokens
};

Ids parse_ids(const std::string& text) {
  Ids ids;
  std::istringstream in(text);
  for (std::string id; std::getline(in, id, ',');) ids.push_back(std::stoi(id));
  return ids;
}

/// All tokens that are not in the cache yet: whole prompts first, then one token of each request.
nanoflow::Batch next_batch(std::vector<Request>& requests, const nanoflow::EngineConfig& config) {
  nanoflow::Batch batch;
  batch.request_indptr = {0};
  batch.page_indptr = {0};
  const int pages_each = config.num_pages / config.max_num_seqs;
  for (int32_t slot = 0; slot < static_cast<int32_t>(requests.size()); ++slot) {
    auto& [tokens, computed, generated] = requests[slot];
    const int end = static_cast<int>(tokens.size());
    for (; computed < end; ++computed) {
      batch.tokens.push_back(tokens[computed]);
      batch.positions.push_back(computed);
    }
    batch.request_indptr.push_back(batch.rows());
    batch.kv_len.push_back(end);
    for (int page = 0; page * config.page_size < end;
         ++page) {  // a range of pages is the request's
      batch.page_indices.push_back(slot * pages_each + page);
    }
    batch.page_indptr.push_back(static_cast<int32_t>(batch.page_indices.size()));
    batch.sample_rows.push_back(batch.rows() - 1);  // what follows its last token
    batch.slots.push_back(slot);
    batch.counter.push_back(generated++);
  }
  const size_t count = requests.size();
  batch.segment_requests = {0, static_cast<int32_t>(count)};  // one segment: nothing is split
  batch.temperature.assign(count, 0.0f);
  batch.top_p.assign(count, 1.0f);
  batch.min_p.assign(count, 0.0f);
  batch.top_k.assign(count, 0);
  batch.seed.assign(count, 0);
  batch.banned_indptr.assign(count + 1, 0);
  return batch;
}

int run(const std::vector<std::string>& arguments) {
  const auto backend = nanoflow::make_backend({.device = nanoflow::parse_device(arguments.at(0))});
  const auto weights = nanoflow::read_weights(arguments.at(1), backend);
  const int steps = std::stoi(arguments.at(2));
  std::vector<Request> requests;
  for (size_t i = 3; i < arguments.size(); ++i) {
    requests.push_back({.tokens = parse_ids(arguments[i])});
  }

  nanoflow::EngineConfig config{.max_num_seqs = static_cast<int>(requests.size())};
  config.num_pages = config.max_num_seqs * (config.max_model_len / config.page_size);
  nanoflow::Schedule schedule;  // one operation after the other, on the whole device
  schedule.lanes = {{"all", backend->width()}};
  nanoflow::Engine engine(config, weights, schedule);

  for (int step = 0; step < steps; ++step) {  // the first is prefill, the others are decode
    const nanoflow::StepHandle handle = engine.submit(next_batch(requests, config));
    const std::vector<int32_t>& sampled = handle.wait().tokens;
    for (size_t i = 0; i < requests.size(); ++i) requests[i].tokens.push_back(sampled[i]);
  }
  for (const Request& request : requests) {
    for (auto id = request.tokens.end() - steps; id != request.tokens.end(); ++id) {
      std::cout << *id << " ";
    }
    std::cout << "\n";
  }
  return EXIT_SUCCESS;
}

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: generate DEVICE MODEL_FOLDER STEPS PROMPT...\n";
    return EXIT_FAILURE;
  }
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {  // nanoflow::Error, or a number that is none
    std::cerr << "generate: " << error.what() << "\n";
    return EXIT_FAILURE;
  }
}
