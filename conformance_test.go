package slirp

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The rows of conformance: testdata/conformance.md says of each what it requires and
// where that is proven, this file holds it to its word.

const conformanceTable = "testdata/conformance.md"

// conformanceRows are the rows that the table must have: prefix, first, last.
var conformanceRows = []struct {
	prefix      string
	first, last int
	digits      int
}{{"T", 1, 152, 3}, {"N", 1, 56, 2}, {"S", 1, 30, 2}, {"S", 40, 54, 2}}

// TestConformance checks the table: every row has an entry, every entry a proof or
// a reason, and every proof exists.
//
//	go test -run 'TestConformance/T064' .
//
// runs what proves row T064, for IPv4 and IPv6. All of it runs in the other tests
// of the package as well, so that without a row in -run only the table is checked,
// unless SLIRP_CONFORMANCE=1 is set. The rows are then no subtests at all: none
// passes that has not run.
func TestConformance(t *testing.T) {
	src, err := os.ReadFile(conformanceTable)
	if err != nil {
		t.Fatal(err)
	}
	rows := parseConformance(t, string(src))
	used := make(map[string]bool)
	internal := make(map[string]map[string]bool) // package directory -> its tests
	count := make(map[string]int)
	for _, want := range conformanceRows {
		for i := want.first; i <= want.last; i++ {
			id := fmt.Sprintf("%s%0*d", want.prefix, want.digits, i)
			row, ok := rows[id]
			if !ok {
				t.Errorf("%s: no row %s", conformanceTable, id)
				continue
			}
			delete(rows, id)
			if err := row.check(used, internal); err != nil {
				t.Errorf("%s:%d: %s: %v", conformanceTable, row.line, id, err)
			}
			count[row.state()]++
			if conformanceSelected() {
				t.Run(id, row.run)
			}
		}
	}
	for id, row := range rows {
		t.Errorf("%s:%d: there is no row %s", conformanceTable, row.line, id)
	}
	for name := range ConformanceTests {
		if !used[name] {
			t.Errorf("%s proves no row of %s", name, conformanceTable)
		}
	}
	scripts, err := filepath.Glob("testdata/script/*.pkt")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range scripts {
		if name := strings.TrimSuffix(filepath.Base(path), ".pkt"); !used[name] {
			t.Errorf("script %s proves no row of %s", name, conformanceTable)
		}
	}
	t.Logf("rows: %d proven, %d inapplicable, %d pending, %d failing",
		count["proven"], count["inapplicable"], count["pending"], count["failing"])
}

// conformanceSelected reports whether the tests of the rows are to run: the second
// element of -run names rows, or the environment wants all.
func conformanceSelected() bool {
	if os.Getenv("SLIRP_CONFORMANCE") == "1" {
		return true
	}
	name, row, _ := strings.Cut(flag.Lookup("test.run").Value.String(), "/")
	ok, _ := regexp.MatchString(name, "TestConformance")
	return ok && row != ""
}

// fails marks a test of what the stack does not do yet: it runs where the row is
// asked for, and nowhere else.
func fails(t *testing.T, row string) {
	t.Helper()
	if !conformanceSelected() {
		t.Skipf("row %s fails: %s", row, conformanceTable)
	}
}

// conformanceRow is one row of the table.
type conformanceRow struct {
	line         int
	requirement  string
	tests        []string    // in ConformanceTests
	scripts      []string    // in testdata/script, without .pkt
	internal     [][2]string // directory of the package and test
	inapplicable string
	pending      string
	failing      string
}

// parseConformance reads the rows of all tables in a Markdown document:
//
//	| T064 | reset at RCV.NXT | `t064_reset_established`, TestT064_Reset, internal/tcp: TestT064ResetExact |
//
// Scripts stand in backticks. The last cell is a list of proofs, or one of "not
// applicable: why", "pending: what" and "failing: what". These, and "note: …", can
// also follow proofs behind a semicolon.
func parseConformance(t *testing.T, src string) map[string]*conformanceRow {
	rows := make(map[string]*conformanceRow)
	for i, line := range strings.Split(src, "\n") {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || strings.HasPrefix(cells[1], "--") || strings.TrimSpace(cells[1]) == "row" {
			continue
		}
		id := strings.TrimSpace(cells[1])
		if rows[id] != nil {
			t.Errorf("%s:%d: row %s is there twice", conformanceTable, i+1, id)
		}
		row := &conformanceRow{line: i + 1, requirement: strings.TrimSpace(cells[2])}
		for _, part := range strings.Split(cells[3], ";") {
			row.parse(strings.TrimSpace(part))
		}
		rows[id] = row
	}
	return rows
}

// parse reads one part of the last cell.
func (r *conformanceRow) parse(part string) {
	word, text, _ := strings.Cut(part, ":")
	switch text = strings.TrimSpace(text); word {
	case "not applicable":
		r.inapplicable = text
	case "pending":
		r.pending = text
	case "failing":
		r.failing = text
	case "note":
	default:
		for _, proof := range strings.Split(part, ",") {
			proof = strings.TrimSpace(proof)
			dir, test, ok := strings.Cut(proof, ": ")
			switch {
			case proof == "":
			case ok:
				r.internal = append(r.internal, [2]string{dir, test})
			case strings.HasPrefix(proof, "`"):
				r.scripts = append(r.scripts, strings.Trim(proof, "`"))
			default:
				r.tests = append(r.tests, proof)
			}
		}
	}
}

// state is how the row counts. One that is pending or fails is not proven, whatever
// parts of it are.
func (r *conformanceRow) state() string {
	switch {
	case r.failing != "":
		return "failing"
	case r.pending != "":
		return "pending"
	case r.inapplicable != "":
		return "inapplicable"
	}
	return "proven"
}

// check returns what is wrong with the row. It notes the tests and scripts of it in
// used, and the tests of other packages in internal.
func (r *conformanceRow) check(used map[string]bool, internal map[string]map[string]bool) error {
	if r.requirement == "" {
		return fmt.Errorf("what does it require?")
	}
	for _, name := range r.tests {
		used[name] = true
		if ConformanceTests[name] == nil {
			return fmt.Errorf("test %s is not in ConformanceTests", name)
		}
	}
	families := make(map[string]bool)
	for _, name := range r.scripts {
		used[name] = true
		src, err := os.ReadFile(scriptPath(name))
		if err != nil {
			return err
		}
		for _, f := range scriptFamilies {
			if only := regexp.MustCompile(`(?m)^--ip_version=(\w+)`).FindSubmatch(src); only == nil || string(only[1]) == f.name {
				families[f.name] = true
			}
		}
	}
	for _, test := range r.internal {
		names := internal[test[0]]
		if names == nil {
			var err error
			if names, err = testsOf(test[0]); err != nil {
				return err
			}
			internal[test[0]] = names
		}
		if !names[test[1]] {
			return fmt.Errorf("no test %s in %s", test[1], test[0])
		}
	}
	switch {
	case r.state() != "proven":
		return nil
	case len(r.tests)+len(r.scripts) == 0 && len(r.internal) > 0:
		return fmt.Errorf("it is proven inside only, and not through the API")
	case len(r.tests)+len(r.scripts) == 0:
		return fmt.Errorf("neither a proof nor a reason")
	case len(r.tests) == 0 && len(families) != len(scriptFamilies) && !strings.Contains(r.requirement, "IPv4 only"):
		return fmt.Errorf("its scripts are for one family")
	}
	return nil
}

// scriptPath is where a script of the table is.
func scriptPath(name string) string {
	return filepath.Join("testdata", "script", filepath.FromSlash(name)+".pkt")
}

// run runs what proves the row.
func (r *conformanceRow) run(t *testing.T) {
	if r.inapplicable != "" {
		t.Skip("not applicable: ", r.inapplicable)
	}
	for _, name := range r.scripts {
		t.Run(name, func(t *testing.T) {
			src, err := os.ReadFile(scriptPath(name))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range scriptFamilies {
				t.Run(f.name, func(t *testing.T) {
					switch out := runScript(t, name+".pkt", string(src), f, false); {
					case out.skip != "":
						t.Skip(out.skip)
					case out.err != nil:
						t.Error(out.err)
					}
				})
			}
		})
	}
	for _, name := range r.tests {
		if f := ConformanceTests[name]; f != nil {
			t.Run(name, f)
		}
	}
	for _, test := range r.internal {
		t.Logf("see also: go test -run '^%s$' ./%s", test[1], test[0])
	}
	if len(r.scripts)+len(r.tests) == 0 {
		t.Skip("pending: ", r.pending)
	}
}

// testsOf returns the tests that the package in a directory has.
func testsOf(dir string) (map[string]bool, error) {
	files, err := filepath.Glob(filepath.Join(filepath.FromSlash(dir), "*_test.go"))
	if err != nil {
		return nil, err
	}
	names := make(map[string]bool)
	for _, path := range files {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
				names[fn.Name.Name] = true
			}
		}
	}
	return names, nil
}

// TestConformanceFinds has entries that must not pass.
func TestConformanceFinds(t *testing.T) {
	for proof, want := range map[string]string{
		"":                                    "neither a proof nor a reason",
		"note: of no use":                     "neither a proof nor a reason",
		"TestNothing":                         "not in ConformanceTests",
		"`t999_nothing`":                      "no such file",
		"internal/tcp: TestNothing":           "no test TestNothing",
		"internal/tcp: TestT064ResetExact":    "not through the API",
		"`t015_default_mss_ipv4`":             "one family",
		"pending: `t064`":                     "",
		"not applicable: there are none":      "",
		"TestT064_Reset; note: TIME-WAIT":     "",
		"TestT064_Reset, internal/tcp: TestX": "no test TestX",
	} {
		r := conformanceRow{requirement: "x"}
		for _, part := range strings.Split(proof, ";") {
			r.parse(strings.TrimSpace(part))
		}
		err := r.check(make(map[string]bool), make(map[string]map[string]bool))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", proof, err, want)
		}
	}
	// The function under a name is the one of that name.
	names, err := testsOf(".")
	if err != nil {
		t.Fatal(err)
	}
	for name := range ConformanceTests {
		if !names[name] {
			t.Errorf("there is no test %s", name)
		}
	}
	if !slices.Contains([]string{"proven", "pending", "failing", "inapplicable"}, new(conformanceRow).state()) {
		t.Error("state")
	}
}

// ConformanceTests are the tests that prove rows, by their names in the table. It is
// exported for the tests of package slirp_test, which add theirs.
var ConformanceTests = map[string]func(*testing.T){
	"TestAccept":                           TestAccept,
	"TestAllow":                            TestAllow,
	"TestConnect":                          TestConnect,
	"TestDialContextErrors":                TestDialContextErrors,
	"TestDialContextICMP":                  TestDialContextICMP,
	"TestDuplicateAddressDetection":        TestDuplicateAddressDetection,
	"TestEcho":                             TestEcho,
	"TestErrorsOfVirtualConn":              TestErrorsOfVirtualConn,
	"TestExtensionHeaderLimit":             TestExtensionHeaderLimit,
	"TestExtensionHeaderOrders":            TestExtensionHeaderOrders,
	"TestFault01_DialOnPacketPath":         TestFault01_DialOnPacketPath,
	"TestFault03_SequenceWrap":             TestFault03_SequenceWrap,
	"TestFault05_FINWithData":              TestFault05_FINWithData,
	"TestFault06_HalfClose":                TestFault06_HalfClose,
	"TestFault07_Reset":                    TestFault07_Reset,
	"TestFault09_DataOnHandshakeACK":       TestFault09_DataOnHandshakeACK,
	"TestFault12_DuplicateACK":             TestFault12_DuplicateACK,
	"TestFault14_HeaderLies":               TestFault14_HeaderLies,
	"TestFault15_StraySegments":            TestFault15_StraySegments,
	"TestFault16_Leaks":                    TestFault16_Leaks,
	"TestFault17_WriterUnderLock":          TestFault17_WriterUnderLock,
	"TestFault22_CloseSendsFINLast":        TestFault22_CloseSendsFINLast,
	"TestFault24_ReadOpensWindow":          TestFault24_ReadOpensWindow,
	"TestFault26_DuplicateACKs":            TestFault26_DuplicateACKs,
	"TestFragmentIDs":                      TestFragmentIDs,
	"TestGuardExcept":                      TestGuardExcept,
	"TestHalfOpenChurn":                    TestHalfOpenChurn,
	"TestHandlePacketErrors":               TestHandlePacketErrors,
	"TestHostResetAfterData":               TestHostResetAfterData,
	"TestKeepAlive":                        TestKeepAlive,
	"TestLastWords":                        TestLastWords,
	"TestLogger":                           TestLogger,
	"TestLoopback":                         TestLoopback,
	"TestMaxHalfOpen":                      TestMaxHalfOpen,
	"TestMaxPendingDials":                  TestMaxPendingDials,
	"TestMaxTCPFlows":                      TestMaxTCPFlows,
	"TestN01EndpointIndependentMapping":    TestN01EndpointIndependentMapping,
	"TestN01MappingSocket":                 TestN01MappingSocket,
	"TestN02NoPortOverloading":             TestN02NoPortOverloading,
	"TestN02_PortsApart":                   TestN02_PortsApart,
	"TestN04N05MappingTimer":               TestN04N05MappingTimer,
	"TestN04_UDPTimer":                     TestN04_UDPTimer,
	"TestN05_Refresh":                      TestN05_Refresh,
	"TestN06_SameNetwork":                  TestN06_SameNetwork,
	"TestN07AddressDependentFiltering":     TestN07AddressDependentFiltering,
	"TestN07MappingSocketFilter":           TestN07MappingSocketFilter,
	"TestN08_Hairpin":                      TestN08_Hairpin,
	"TestN09_NoGateway":                    TestN09_NoGateway,
	"TestN10Deterministic":                 TestN10Deterministic,
	"TestN10_Deterministic":                TestN10_Deterministic,
	"TestN11MappingErrors":                 TestN11MappingErrors,
	"TestN11MappingSocketErrors":           TestN11MappingSocketErrors,
	"TestN12_N13_TooBigForTheHost":         TestN12_N13_TooBigForTheHost,
	"TestN14_PolicyAfterReassembly":        TestN14_PolicyAfterReassembly,
	"TestN14_ReassembledEcho":              TestN14_ReassembledEcho,
	"TestN14_ReassembledUDP":               TestN14_ReassembledUDP,
	"TestN18_IdleTCP":                      TestN18_IdleTCP,
	"TestN20_PingsApart":                   TestN20_PingsApart,
	"TestN21_CraftedErrors":                TestN21_CraftedErrors,
	"TestN21_QuotedHeaders":                TestN21_QuotedHeaders,
	"TestN22N24MappingLimit":               TestN22N24MappingLimit,
	"TestN22ReclaimUnanswered":             TestN22ReclaimUnanswered,
	"TestN22_FullTable":                    TestN22_FullTable,
	"TestN23_PingGateway":                  TestN23_PingGateway,
	"TestN25MappingPolicy":                 TestN25MappingPolicy,
	"TestN25NoSocketOnDeny":                TestN25NoSocketOnDeny,
	"TestN26LateDatagram":                  TestN26LateDatagram,
	"TestN26_LateDatagram":                 TestN26_LateDatagram,
	"TestN27MappingPorts":                  TestN27MappingPorts,
	"TestN27_ExternalPorts":                TestN27_ExternalPorts,
	"TestN28_FragmentIDs":                  TestN28_FragmentIDs,
	"TestN28_Identifications":              TestN28_Identifications,
	"TestN29_HopLimitOfFragments":          TestN29_HopLimitOfFragments,
	"TestN29_HopLimitOfLocalPackets":       TestN29_HopLimitOfLocalPackets,
	"TestN29_N56_Traceroute":               TestN29_N56_Traceroute,
	"TestN30_BadOptions":                   TestN30_BadOptions,
	"TestN30_IPv4Options":                  TestN30_IPv4Options,
	"TestN30_Options":                      TestN30_Options,
	"TestN32_N36_Overlap":                  TestN32_N36_Overlap,
	"TestN33_Ends":                         TestN33_Ends,
	"TestN33_N37_FragmentProblems":         TestN33_N37_FragmentProblems,
	"TestN34_FragmentTimer":                TestN34_FragmentTimer,
	"TestN34_ReassemblyTimeout":            TestN34_ReassemblyTimeout,
	"TestN35_Keys":                         TestN35_Keys,
	"TestN38_Atomic":                       TestN38_Atomic,
	"TestN39_HeaderProblemAfterReassembly": TestN39_HeaderProblemAfterReassembly,
	"TestN39_HeaderProblemRate":            TestN39_HeaderProblemRate,
	"TestN39_N42_HeaderProblems":           TestN39_N42_HeaderProblems,
	"TestN41_ExtensionHeaders":             TestN41_ExtensionHeaders,
	"TestN43_S16_FairShares":               TestN43_S16_FairShares,
	"TestN45_FragmentedSolicitation":       TestN45_FragmentedSolicitation,
	"TestN48_PacketTooBigUDP":              TestN48_PacketTooBigUDP,
	"TestN48_PathsBounded":                 TestN48_PathsBounded,
	"TestN54NoSocketForGroups":             TestN54NoSocketForGroups,
	"TestN55_Boundaries":                   TestN55_Boundaries,
	"TestNamespacesOfFlows":                TestNamespacesOfFlows,
	"TestNeighborSolicitation":             TestNeighborSolicitation,
	"TestNeighborSolicitationDropped":      TestNeighborSolicitationDropped,
	"TestNoFlowNoGoroutine":                TestNoFlowNoGoroutine,
	"TestParseIP":                          TestParseIP,
	"TestParseIPLengthLies":                TestParseIPLengthLies,
	"TestQuoteIsTheGuestsPacket":           TestQuoteIsTheGuestsPacket,
	"TestRandomGuest":                      TestRandomGuest,
	"TestReclaimIsBounded":                 TestReclaimIsBounded,
	"TestRefusal":                          TestRefusal,
	"TestS01_Bounds":                       TestS01_Bounds,
	"TestS01_SYNFlood":                     TestS01_SYNFlood,
	"TestS02_DialFlood":                    TestS02_DialFlood,
	"TestS03_UDPFlood":                     TestS03_UDPFlood,
	"TestS04_FragmentFlood":                TestS04_FragmentFlood,
	"TestS05_SingleBytes":                  TestS05_SingleBytes,
	"TestS06_TinyMSS":                      TestS06_TinyMSS,
	"TestS07_SACKBlocks":                   TestS07_SACKBlocks,
	"TestS08_SACKArithmetic":               TestS08_SACKArithmetic,
	"TestS09_ClosedWindows":                TestS09_ClosedWindows,
	"TestS09_HostGone":                     TestS09_HostGone,
	"TestS09_StackBound":                   TestS09_StackBound,
	"TestS10_Orphan":                       TestS10_Orphan,
	"TestS10_Trickle":                      TestS10_Trickle,
	"TestS11_Orphans":                      TestS11_Orphans,
	"TestS12_TimeWait":                     TestS12_TimeWait,
	"TestS14_OptimisticACKs":               TestS14_OptimisticACKs,
	"TestS15_DuplicateACKs":                TestS15_DuplicateACKs,
	"TestS16_Strays":                       TestS16_Strays,
	"TestS17_ACKStorm":                     TestS17_ACKStorm,
	"TestS18_Goroutines":                   TestS18_Goroutines,
	"TestS19_NoDescriptors":                TestS19_NoDescriptors,
	"TestS20_Canary":                       TestS20_Canary,
	"TestS21_Work":                         TestS21_Work,
	"TestS23_Checksums":                    TestS23_Checksums,
	"TestS27_LongUptime":                   TestS27_LongUptime,
	"TestS30_NeverAcknowledged":            TestS30_NeverAcknowledged,
	"TestS40_SourcePolicy":                 TestS40_SourcePolicy,
	"TestS42_Land":                         TestS42_Land,
	"TestS42_LandUDP":                      TestS42_LandUDP,
	"TestS43S44S45S46Guard":                TestS43S44S45S46Guard,
	"TestS47Groups":                        TestS47Groups,
	"TestS48GuardControl":                  TestS48GuardControl,
	"TestS49_Hairpin":                      TestS49_Hairpin,
	"TestS51_PlaysRouter":                  TestS51_PlaysRouter,
	"TestS52_PortsUsedAgain":               TestS52_PortsUsedAgain,
	"TestS53_NoHostListener":               TestS53_NoHostListener,
	"TestS54_Log":                          TestS54_Log,
	"TestS54_LogRate":                      TestS54_LogRate,
	"TestSlowGuestBound":                   TestSlowGuestBound,
	"TestStuckHost":                        TestStuckHost,
	"TestStuckWriter":                      TestStuckWriter,
	"TestStuckWriterAtClose":               TestStuckWriterAtClose,
	"TestT001_Checksums":                   TestT001_Checksums,
	"TestT001_EveryLength":                 TestT001_EveryLength,
	"TestT002_DataOffset":                  TestT002_DataOffset,
	"TestT008_ECNSetup":                    TestT008_ECNSetup,
	"TestT011_HugeWindow":                  TestT011_HugeWindow,
	"TestT012_SequenceSpace":               TestT012_SequenceSpace,
	"TestT014_OptionsAreAnswered":          TestT014_OptionsAreAnswered,
	"TestT021_SYNACKRetransmission":        TestT021_SYNACKRetransmission,
	"TestT022_DuplicateSYN":                TestT022_DuplicateSYN,
	"TestT023_OneDialForManySYNs":          TestT023_OneDialForManySYNs,
	"TestT025_NewSYN":                      TestT025_NewSYN,
	"TestT026_BadACKInSYNReceived":         TestT026_BadACKInSYNReceived,
	"TestT028_DataOnSYN":                   TestT028_DataOnSYN,
	"TestT032_Backlog":                     TestT032_Backlog,
	"TestT033_ListenerCloseWithChildren":   TestT033_ListenerCloseWithChildren,
	"TestT034_ResetBehindData":             TestT034_ResetBehindData,
	"TestT035_ISN":                         TestT035_ISN,
	"TestT036_AddressesThatAreNoHost":      TestT036_AddressesThatAreNoHost,
	"TestT041_SimultaneousOpen":            TestT041_SimultaneousOpen,
	"TestT046_SourcePorts":                 TestT046_SourcePorts,
	"TestT048_Acceptability":               TestT048_Acceptability,
	"TestT052_Orders":                      TestT052_Orders,
	"TestT053_Overlaps":                    TestT053_Overlaps,
	"TestT063_SingleBytes":                 TestT063_SingleBytes,
	"TestT064_Reset":                       TestT064_Reset,
	"TestT068_SYNInConnection":             TestT068_SYNInConnection,
	"TestT068_SYNInEveryState":             TestT068_SYNInEveryState,
	"TestT069_ChallengesPerFlow":           TestT069_ChallengesPerFlow,
	"TestT070_ZeroWindow":                  TestT070_ZeroWindow,
	"TestT072_RightEdge":                   TestT072_RightEdge,
	"TestT075_DayOfProbes":                 TestT075_DayOfProbes,
	"TestT076_SilenceAfterAnswers":         TestT076_SilenceAfterAnswers,
	"TestT079_ByteByByte":                  TestT079_ByteByByte,
	"TestT080_BothStalled":                 TestT080_BothStalled,
	"TestT081_ByteByByte":                  TestT081_ByteByByte,
	"TestT118_AckDivision":                 TestT118_AckDivision,
	"TestT121_Offsets":                     TestT121_Offsets,
	"TestT131_HalfClosedBulk":              TestT131_HalfClosedBulk,
	"TestT142_CloseInEveryState":           TestT142_CloseInEveryState,
	"TestT142_Handshakes":                  TestT142_Handshakes,
	"TestT144_GuestKeepAlive":              TestT144_GuestKeepAlive,
	"TestT145_Urgent":                      TestT145_Urgent,
	"TestT146_ICMPAboutLiveFlow":           TestT146_ICMPAboutLiveFlow,
	"TestT148_ManyPacketsTooBig":           TestT148_ManyPacketsTooBig,
	"TestT148_N48_PacketTooBigTCP":         TestT148_N48_PacketTooBigTCP,
	"TestT148_PacketTooBigIgnored":         TestT148_PacketTooBigIgnored,
	"TestT148_TransferOverSmallerPath":     TestT148_TransferOverSmallerPath,
	"TestT152_FlowIsolation":               TestT152_FlowIsolation,
	"TestTimeWaitCap":                      TestTimeWaitCap,
	"TestTimeWaitReuse":                    TestTimeWaitReuse,
	"TestTwoStacks":                        TestTwoStacks,
	"TestUDPAccepted":                      TestUDPAccepted,
	"TestUDPAllowSees":                     TestUDPAllowSees,
	"TestUDPChecksumIsNeverZero":           TestUDPChecksumIsNeverZero,
	"TestUDPDropped":                       TestUDPDropped,
	"TestUDPExpiry":                        TestUDPExpiry,
	"TestUDPHostErrors":                    TestUDPHostErrors,
	"TestUDPLongest":                       TestUDPLongest,
	"TestUDPMaxFlows":                      TestUDPMaxFlows,
	"TestUDPMaxPendingDials":               TestUDPMaxPendingDials,
	"TestUDPNamespaces":                    TestUDPNamespaces,
	"TestUDPRefusal":                       TestUDPRefusal,
	"TestUDPRelay":                         TestUDPRelay,
	"TestUDPSocket":                        TestUDPSocket,
	"TestUDPSocketRefusedThenServed":       TestUDPSocketRefusedThenServed,
	"TestUDPStuckHost":                     TestUDPStuckHost,
	"TestUDPStuckWriter":                   TestUDPStuckWriter,
	"TestUDPTogether":                      TestUDPTogether,
	"TestUnreachable":                      TestUnreachable,
	"TestUnreachableNeverAbout":            TestUnreachableNeverAbout,
	"TestUnreachableRateLimit":             TestUnreachableRateLimit,
	"TestUSOFilter":                        TestUSOFilter,
	"TestUSOPathMTU":                       TestUSOPathMTU,
	"TestVirtualConnCloseUnread":           TestVirtualConnCloseUnread,
	"TestVirtualConnLinger":                TestVirtualConnLinger,
	"TestVirtualHours":                     TestVirtualHours,
	"TestSoakDays":                         TestSoakDays,
	"TestWindowBehindReordering":           TestWindowBehindReordering,
}
