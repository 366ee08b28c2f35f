#include <fstream>

#include "check.h"
#include "sparsek/threads.h"

using namespace sparsek;
namespace fs = std::filesystem;

namespace {

// A tree of control groups in a fresh folder.
class Groups {
   public:
    Groups() {
        fs::remove_all(root);
        fs::create_directories(root);
    }
    ~Groups() { fs::remove_all(root); }
    Groups(const Groups&) = delete;
    Groups& operator=(const Groups&) = delete;

    void write(const fs::path& file, const char* content) const {
        fs::create_directories((root / file).parent_path());
        std::ofstream(root / file) << content;
    }

    const fs::path root = fs::temp_directory_path() / "sparsek-test-groups";
};

void no_groups_no_limit() {
    const Groups groups;
    CHECK(cgroup_cpus("", groups.root) == 0);
    CHECK(cgroup_cpus("0::/\n", groups.root) == 0);
    CHECK(cgroup_cpus("nonsense", groups.root) == 0);
}

void v2_takes_the_smallest_on_the_way_to_the_root() {
    const Groups groups;
    groups.write("a/cpu.max", "350000 100000\n");
    groups.write("a/b/cpu.max", "max 100000\n");
    CHECK(cgroup_cpus("0::/a/b\n", groups.root) == 4);
    groups.write("a/b/cpu.max", "50000 100000\n");
    CHECK(cgroup_cpus("0::/a/b\n", groups.root) == 1);
    CHECK(cgroup_cpus("0::/a\n", groups.root) == 4);
}

void v2_in_a_container_sees_only_the_root() {
    const Groups groups;
    groups.write("cpu.max", "200000 100000\n");
    CHECK(cgroup_cpus("0::/host/path\n", groups.root) == 2);
}

void v1_reads_the_cpu_controller() {
    const Groups groups;
    groups.write("cpu/a/cpu.cfs_quota_us", "300000\n");
    groups.write("cpu/a/cpu.cfs_period_us", "100000\n");
    CHECK(cgroup_cpus("4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n", groups.root) == 3);
    CHECK(cgroup_cpus("4:cpuset:/a\n", groups.root) == 0);
    groups.write("cpu/a/cpu.cfs_quota_us", "-1\n");
    CHECK(cgroup_cpus("3:cpu,cpuacct:/a\n", groups.root) == 0);
}

void the_number_is_validated() {
    CHECK(parse_num_threads("", 7) == 7);
    CHECK(parse_num_threads("12", 7) == 12);
    for (const char* wrong : {"0", "-1", "1025", "2.5", "2 ", "two", "99999999999"}) {
        const std::string expected =
            "SPARSEK_NUM_THREADS = '" + std::string(wrong) + "': must be a whole number from 1 to 1024";
        CHECK(message_of([wrong] { parse_num_threads(wrong, 7); }) == expected);
    }
}

void this_machine_has_a_processor() { CHECK(available_cpus() >= 1); }

}  // namespace

int main() {
    no_groups_no_limit();
    v2_takes_the_smallest_on_the_way_to_the_root();
    v2_in_a_container_sees_only_the_root();
    v1_reads_the_cpu_controller();
    the_number_is_validated();
    this_machine_has_a_processor();
    return failures;
}
