// Times layers of llama.cpp on a GPU; scripts/llama-beside compiles it and says how it is called.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cuda.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <string>
#include <vector>

static std::vector<std::string> parts(const std::string & text, char end) {
    std::vector<std::string> out;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, end);) out.push_back(part);
    return out;
}

static ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * known = ggml_type_name((ggml_type) i);
        std::string lower = known ? known : "";
        std::transform(lower.begin(), lower.end(), lower.begin(), ::tolower);
        if (lower == name) return (ggml_type) i;
    }
    fprintf(stderr, "no type of llama.cpp: %s\n", name.c_str());
    exit(1);
}

// Microseconds of a layer: the best of nine runs of a graph of `count` layers over all copies.
static double measure(ggml_backend_t backend, ggml_type type, int64_t rows, int64_t cols, int64_t batch) {
    const size_t bytes = ggml_row_size(type, cols) * rows;
    const int copies = (int) std::clamp<size_t>((400u << 20) / bytes, 2, 200);
    const int count = std::max(copies, 64 / copies * copies);
    ggml_context * ctx = ggml_init({ggml_tensor_overhead() * (copies + 1), nullptr, true});
    std::vector<ggml_tensor *> weights;
    for (int i = 0; i < copies; i++) weights.push_back(ggml_new_tensor_2d(ctx, type, cols, rows));
    ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, cols, batch);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const int64_t some = 16;
    std::vector<float> values(cols * std::max(some, batch)), importance(cols, 1.0f);
    for (float & value : values) value = normal(random);
    std::vector<char> row(ggml_row_size(type, cols) * some), matrix(bytes);
    ggml_quantize_chunk(type, values.data(), row.data(), 0, some, cols, importance.data());
    for (size_t at = 0; at < bytes; at += row.size()) std::copy_n(row.data(), std::min(row.size(), bytes - at), matrix.data() + at);
    for (ggml_tensor * weight : weights) ggml_backend_tensor_set(weight, matrix.data(), 0, bytes);
    ggml_backend_tensor_set(x, values.data(), 0, cols * batch * sizeof(float));

    ggml_context * nodes = ggml_init({ggml_tensor_overhead() * count + ggml_graph_overhead_custom(count + 8, false), nullptr, true});
    ggml_cgraph * graph = ggml_new_graph_custom(nodes, count + 8, false);
    for (int i = 0; i < count; i++) ggml_build_forward_expand(graph, ggml_mul_mat(nodes, weights[i % copies], x));
    ggml_gallocr_t memory = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
    ggml_gallocr_alloc_graph(memory, graph);
    double best = 1e30;
    for (int run = 0; run < 12; run++) {
        ggml_backend_synchronize(backend);
        auto begin = std::chrono::steady_clock::now();
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) exit(1);
        ggml_backend_synchronize(backend);
        std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
        if (run >= 3) best = std::min(best, took.count() / count);
    }
    ggml_gallocr_free(memory);
    ggml_free(nodes);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return best;
}

int main(int argc, char ** argv) {
    ggml_backend_t backend = ggml_backend_cuda_init(0);
    if (!backend) return 1;
    for (const std::string & name : parts(argv[1], ','))
        for (int i = 3; i < argc; i++)
            for (const std::string & batch : parts(argv[2], ',')) {
                auto shape = parts(argv[i], 'x');
                double us = measure(backend, type_of(name), atoll(shape[0].c_str()), atoll(shape[1].c_str()), atoll(batch.c_str()));
                printf("llama.cpp %-6s %13s %4s %8.2f us\n", name.c_str(), argv[i], batch.c_str(), us);
                fflush(stdout);
            }
    ggml_backend_free(backend);
}
