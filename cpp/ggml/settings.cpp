#include "settings.h"

#include <regex.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace sparsek::ggml {
namespace {

constexpr int64_t kMost = 2147483647;

[[noreturn]] void refuse(const std::string& field, const std::string& given, const std::string& allowed) {
    throw std::invalid_argument(field + " = " + given + ": must be " + allowed);
}

int64_t number(const std::string& field, const std::string& text) {
    const bool digits =
        !text.empty() && text.size() <= 10 &&
        std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
    const int64_t n = digits ? std::stoll(text) : -1;
    if (n < 0 || n > kMost) refuse(field, "'" + text + "'", "a whole number from 0 to 2147483647");
    return n;
}

// Whatever the decimal point of the host's language is.
float share(const std::string& field, const std::string& text) {
    std::istringstream stream(text);
    stream.imbue(std::locale::classic());
    double x = -1.0;
    stream >> std::noskipws >> x;
    if (stream.fail() || !stream.eof() || !(x >= 0.0 && x <= 1.0))
        refuse(field, "'" + text + "'", "a number from 0 to 1");
    return x > 0.0 ? std::max(static_cast<float>(x), std::numeric_limits<float>::denorm_min()) : 0.0f;
}

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

// One field from text like "64", "auto", "64,auto,32" or "none".
void set(Settings* s, const std::string& field, const std::string& text) {
    if (field == "top_k") {
        s->top_k.clear();
        for (const std::string& part : split(text))
            s->top_k.push_back(part == "auto" ? Settings::kAuto : number(field, part));
        if (s->top_k.empty()) refuse(field, "''", "a whole number, auto, or one of these per layer");
    } else if (field == "dense_layers") {
        s->dense_layers.clear();
        if (text == "none") return;
        for (const std::string& part : split(text)) s->dense_layers.push_back(number(field, part));
    } else if (field == "tail") {
        if (text != "none" && text != "centroid") refuse(field, "'" + text + "'", "none or centroid");
        s->centroid_tail = text == "centroid";
    } else if (field == "sinks") {
        s->sinks = number(field, text);
    } else if (field == "window") {
        s->window = number(field, text);
    } else if (field == "stride") {
        s->stride = number(field, text);
    } else if (field == "min_context") {
        s->min_context = number(field, text);
    } else if (field == "select") {
        if (text != "query" && text != "auto")
            refuse(field, "'" + text + "'", "auto or query in llama.cpp: tiles are for GPUs");
    } else if (field == "min_share") {
        s->min_share = share(field, text);
    } else if (field != "check_finite" && field != "tile") {
        throw std::invalid_argument(
            "there is no field '" + field +
            "': known are top_k, min_share, sinks, window, stride, tail, dense_layers, min_context");
    }
}

// What no single field shows.
Settings checked(const Settings& s) {
    const bool some_zero = std::find(s.top_k.begin(), s.top_k.end(), 0) != s.top_k.end();
    if (!s.off() && some_zero && s.sinks + s.window + s.stride == 0)
        throw std::invalid_argument(
            "top_k = 0 with sinks = window = stride = 0 keeps no key at all in a layer");
    return s;
}

// A JSON object of numbers, words and lists of these, its values as the text that set() takes.
class Reader {
   public:
    explicit Reader(const std::string& text) : text_(text) {}

    template <typename Field>
    void object(Field&& on_field) {
        expect('{');
        if (!take('}')) {
            do {
                const std::string name = string();
                expect(':');
                skip();
                const bool is_list = peek() == '[';
                if (is_list && name != "top_k" && name != "dense_layers") fail();
                const std::string text = is_list ? list() : value();
                if (name == "check_finite" && text != "true" && text != "false") fail();
                on_field(name, text);
            } while (take(','));
            expect('}');
        }
        skip();
        if (at_ != text_.size()) fail();
    }

   private:
    std::string list() {
        expect('[');
        std::string all;
        if (take(']')) return "none";
        do all += (all.empty() ? "" : ",") + value();
        while (take(','));
        expect(']');
        return all;
    }
    std::string value() {
        skip();
        if (peek() == '"') return string();
        std::string word;
        while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) ||
                                      text_[at_] == '-' || text_[at_] == '.' || text_[at_] == '+'))
            word += text_[at_++];
        if (word.empty()) fail();
        return word;
    }
    std::string string() {
        expect('"');
        std::string s;
        while (at_ < text_.size() && text_[at_] != '"') s += text_[at_++];
        expect('"');
        return s;
    }
    void skip() {
        while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    }
    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    bool take(char c) {
        skip();
        if (peek() != c) return false;
        ++at_;
        return true;
    }
    void expect(char c) {
        if (!take(c)) fail();
    }
    [[noreturn]] void fail() const {
        const std::string rest = at_ < text_.size() ? "'" + text_.substr(at_, 40) + "'" : "its end";
        throw std::invalid_argument("not a JSON object of settings, at character " + std::to_string(at_) +
                                    ": " + rest);
    }

    const std::string& text_;
    size_t at_ = 0;
};

// Of a plain file: a pipe or a device might never end.
std::string file_text(const char* path) {
    constexpr off_t kLongest = 1 << 20;
    const std::string given = std::string("SPARSEK_CONFIG = '") + path + "'";
    struct stat about{};
    if (stat(path, &about) != 0) throw std::invalid_argument(given + ": there is no such file");
    if (!S_ISREG(about.st_mode)) throw std::invalid_argument(given + ": not a file");
    if (about.st_size > kLongest) throw std::invalid_argument(given + ": longer than 1 MiB");
    std::ifstream file(path);
    if (!file) throw std::invalid_argument(given + ": cannot be read");
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

// What Kubernetes sets in every pod beside a Service called sparsek, or sparsek-and-so-on, and Docker for a
// linked container of that name. The expression of src/sparsek/integrations/environment.py, matched by the C
// library: std::regex is compiled into us and into the host, whose version of it may be another.
bool is_of_a_service(const std::string& variable) {
    constexpr const char* kNames =
        "^SPARSEK(_[A-Z0-9_]+)?_"
        "(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|"
        "PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?|NAME|ENV_.+)$";
    regex_t expression;
    if (regcomp(&expression, kNames, REG_EXTENDED | REG_NOSUB) != 0) return false;
    const bool matches = regexec(&expression, variable.c_str(), 0, nullptr, 0) == 0;
    regfree(&expression);
    return matches;
}

// A variable with a typing error in its name would be obeyed by nobody.
void refuse_unknown(const std::vector<std::string>& known) {
    constexpr const char* kPrefix = "SPARSEK_";
    for (char** entry = environ; *entry; ++entry) {
        const std::string text = *entry, name = text.substr(0, text.find('='));
        if (name.rfind(kPrefix, 0) != 0 || is_of_a_service(name)) continue;
        if (std::find(known.begin(), known.end(), name) != known.end()) continue;
        std::string all;
        for (const std::string& variable : known) all += (all.empty() ? "" : ", ") + variable;
        throw std::invalid_argument("there is no variable " + name + ": known are " + all);
    }
}

}  // namespace

Rule Settings::rule(int64_t layer, int64_t num_keys, int64_t seen) const {
    if (!why_dense(layer, seen).empty()) return {num_keys, sinks, window, stride, centroid_tail, 0.0f};
    const int64_t last = min_share > 0.0f ? 1 : 0;  // no key may have the share
    return {std::min(best(layer, seen), num_keys),
            sinks,
            std::max(window, last),
            stride,
            centroid_tail,
            min_share};
}

std::string Settings::why_dense(int64_t layer, int64_t seen) const {
    if (off()) return "top_k = 0";
    if (std::find(dense_layers.begin(), dense_layers.end(), layer) != dense_layers.end())
        return "dense_layers";
    if (seen < min_context)
        return std::to_string(seen) + " tokens, min_context = " + std::to_string(min_context);
    const int64_t k = best(layer, seen);
    if (k >= seen && min_share == 0.0f) return "top_k keeps all";
    return k + sinks + window + stride == 0 ? "top_k = 0" : "";
}

// top_k of a layer.
int64_t Settings::best(int64_t layer, int64_t seen) const {
    const auto of_layer = static_cast<size_t>(layer);
    const int64_t k = top_k.size() == 1 || layer < 0 ? top_k[0]
                      : of_layer < top_k.size()      ? top_k[of_layer]
                                                     : seen;
    if (k != kAuto) return k;
    if (min_share > 0.0f) return seen;
    const auto steps = static_cast<int64_t>(std::nearbyint(std::sqrt(static_cast<double>(seen)) / 16));
    return std::max<int64_t>(32, 16 * steps);
}

std::string Settings::words() const {
    std::string ks;
    for (const int64_t k : top_k) ks += (ks.empty() ? "" : ",") + (k == kAuto ? "auto" : std::to_string(k));
    std::ostringstream share;
    if (min_share > 0.0f) share << ", min_share = " << min_share;
    return "top_k = " + ks + share.str() + ", sinks = " + std::to_string(sinks) +
           ", window = " + std::to_string(window) +
           (stride > 0 ? ", stride = " + std::to_string(stride) : "") +
           ", tail = " + (centroid_tail ? "centroid" : "none") +
           ", min_context = " + std::to_string(min_context);
}

Settings settings_from_json(const std::string& text, Settings s) {
    Reader(text).object([&](const std::string& name, const std::string& value) { set(&s, name, value); });
    return checked(s);
}

Settings settings_from_environment() {
    Settings s;
    if (const char* path = std::getenv("SPARSEK_CONFIG")) {
        const std::string text = file_text(path);
        try {
            s = settings_from_json(text, s);
        } catch (const std::invalid_argument& error) {
            throw std::invalid_argument("SPARSEK_CONFIG = '" + std::string(path) + "': " + error.what());
        }
    }
    std::vector<std::string> known = {"SPARSEK_CONFIG", "SPARSEK_ISA", "SPARSEK_NUM_THREADS",
                                      "SPARSEK_STATS"};
    for (const char* field :
         {"top_k", "min_share", "sinks", "window", "stride", "tail", "dense_layers", "min_context"}) {
        std::string variable = "SPARSEK_";
        for (const char* c = field; *c; ++c)
            variable += static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
        try {
            if (const char* value = std::getenv(variable.c_str())) set(&s, field, value);
        } catch (const std::invalid_argument& error) {
            throw std::invalid_argument(variable + ": " + error.what());
        }
        known.push_back(variable);
    }
    refuse_unknown(known);
    return checked(s);
}

bool stats_from_environment() {
    const char* value = std::getenv("SPARSEK_STATS");
    const std::string text = value ? value : "0";
    if (text != "0" && text != "1") refuse("SPARSEK_STATS", "'" + text + "'", "0 or 1");
    return text == "1";
}

}  // namespace sparsek::ggml
